"""Turns protobuf messages into the engine's values and back: the one file of the workers that knows both."""

from collections.abc import Iterable, Iterator, Sequence

from engine.request import FinishReason, PromptToken, SampledToken, SamplingParams
from kvtransfer.layout import BlockId, KVLayout
from kvtransfer.manifest import BlockEntry
from kvtransfer.transport import TransportOffer
from staffetta.v1 import common_pb2, prefill_pb2
from staffetta.validate import MAX_CHOICES

PROMPT_TOKENS_PER_MESSAGE = 512
"""512 tokens with 20 alternatives each stay below the message bound."""

_FINISH_TO_PROTO = {
    FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: common_pb2.FINISH_REASON_CANCELLED,
    FinishReason.ERROR: common_pb2.FINISH_REASON_ERROR,
}


def finish_reason_to_proto(reason: FinishReason | None) -> common_pb2.FinishReason.ValueType:
    """None becomes UNSPECIFIED: the sequence goes on."""
    return common_pb2.FINISH_REASON_UNSPECIFIED if reason is None else _FINISH_TO_PROTO[reason]


def token_to_proto(token: SampledToken) -> common_pb2.Token:
    """One generated token for the wire."""
    message = common_pb2.Token()
    fill_token(message, token)
    return message


def fill_token(message: common_pb2.Token, token: SampledToken) -> None:
    """Makes an empty message, which may be part of another, that of a generated token."""
    message.index = token.index
    message.token_id = token.token_id
    if token.logprob is not None:
        message.logprob = token.logprob
    for token_id, logprob in token.top_logprobs:
        message.top_logprobs.add(token_id=token_id, logprob=logprob)


def token_from_proto(message: common_pb2.Token) -> SampledToken:
    """One generated token from the wire."""
    return SampledToken(
        index=message.index,
        token_id=message.token_id,
        logprob=message.logprob if message.HasField("logprob") else None,
        top_logprobs=tuple((top.token_id, top.logprob) for top in message.top_logprobs),
    )


def prompt_token_parts(tokens: Sequence[PromptToken]) -> Iterator[list[common_pb2.Token]]:
    """A prompt's scored tokens for the wire, in runs that fit one session message each; no run when there are none."""
    for first in range(0, len(tokens), PROMPT_TOKENS_PER_MESSAGE):
        yield [
            common_pb2.Token(
                index=token.position,
                token_id=token.token_id,
                logprob=token.logprob,
                top_logprobs=[
                    common_pb2.TokenLogprob(token_id=token_id, logprob=logprob)
                    for token_id, logprob in token.top_logprobs
                ],
            )
            for token in tokens[first : first + PROMPT_TOKENS_PER_MESSAGE]
        ]


def prompt_token_from_proto(message: common_pb2.Token) -> PromptToken:
    """One scored token of a prompt from the wire."""
    return PromptToken(
        position=message.index,
        token_id=message.token_id,
        logprob=message.logprob,
        top_logprobs=tuple((top.token_id, top.logprob) for top in message.top_logprobs),
    )


def choices_from_proto(
    sampling: common_pb2.SamplingParams, *, first_token_index: int, choice_index: int
) -> tuple[int, ...]:
    """The choices of a request: from 0 to n - 1, or after a restart the one that goes on.

    Bounded whatever the message says, so that a request that is refused can be answered choice by choice.
    """
    if first_token_index:
        return (choice_index,)
    return tuple(range(min(max(1, sampling.n), MAX_CHOICES)))


def sampling_from_proto(message: common_pb2.SamplingParams, *, eos_token_ids: Iterable[int]) -> SamplingParams:
    """Resolved parameters for the engine. Bounds have been checked by `staffetta.validate` before."""
    stop_token_ids = frozenset(message.stop_token_ids)
    if not message.ignore_eos:
        stop_token_ids |= frozenset(eos_token_ids)
    return SamplingParams(
        temperature=message.temperature + 0.0,  # never -0.0
        top_k=message.top_k,
        top_p=message.top_p,
        seed=message.seed,
        max_tokens=message.max_tokens,
        min_tokens=message.min_tokens,
        stop_token_ids=stop_token_ids,
        num_logprobs=message.logprobs if message.HasField("logprobs") else None,
        repetition_penalty=message.repetition_penalty if message.HasField("repetition_penalty") else 1.0,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        num_prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
    )


def layout_to_proto(layout: KVLayout) -> common_pb2.KVLayout:
    """The layout for handshakes and announcements."""
    return common_pb2.KVLayout(
        layout_id=layout.layout_id,
        groups=[
            common_pb2.KVGroup(
                kind=group.kind,
                num_layers=group.num_layers,
                num_kv_heads=group.num_kv_heads,
                head_dim=group.head_dim,
                block_size=group.block_size,
                dtype=group.dtype,
            )
            for group in layout.groups
        ],
    )


def offer_to_proto(offer: TransportOffer) -> prefill_pb2.TransportOffer:
    """One way to read a pool, for the wire."""
    return prefill_pb2.TransportOffer(
        transport=offer.transport,
        endpoint=offer.endpoint,
        session_key=offer.session_key,
        num_blocks=offer.num_blocks,
    )


def offer_from_proto(message: prefill_pb2.TransportOffer) -> TransportOffer:
    """One way to read a peer's pool, from the wire."""
    return TransportOffer(
        transport=message.transport,
        endpoint=message.endpoint,
        session_key=message.session_key,
        num_blocks=message.num_blocks,
    )


def entry_to_proto(entry: BlockEntry) -> prefill_pb2.BlockEntry:
    """One block's manifest, for the wire."""
    return prefill_pb2.BlockEntry(
        block_id=entry.block_id,
        block_index=entry.block_index,
        num_tokens=entry.num_tokens,
        generation=entry.generation,
        chain_hash=entry.chain_hash,
        head_checksums=entry.head_checksums,
    )


def entry_from_proto(message: prefill_pb2.BlockEntry) -> BlockEntry:
    """One block's manifest, from the wire."""
    return BlockEntry(
        block_id=BlockId(message.block_id),
        block_index=message.block_index,
        num_tokens=message.num_tokens,
        generation=message.generation,
        chain_hash=message.chain_hash,
        head_checksums=tuple(message.head_checksums),
    )
