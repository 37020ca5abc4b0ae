"""What a step brought, as outputs for whoever sent the request: nothing is told twice, nothing is left out.

Tokens are booked here with their sequence. Nobody is retired, held or forked here.
"""

from engine.cache.pool import BlockPool
from engine.request import FinalBlock, PromptToken, SequenceOutput
from engine.sequence import Sequence
from engine.step import SliceResult


def choice_output(
    sequence: Sequence, result: SliceResult, prompt_tokens: tuple[PromptToken, ...], *, now: float
) -> SequenceOutput:
    """The news of a sequence that will not fork by them; it ends when the output says why."""
    reason = sequence.append(result.tokens[0], now=now) if result.tokens else None
    return SequenceOutput(
        sequence.request_id,
        sequence.open_choices[0],
        tokens=result.tokens,
        prompt_tokens=prompt_tokens,
        finish_reason=reason,
        stats=None if reason is None else sequence.stats(now=now),
    )


def first_outputs(
    parent: Sequence, result: SliceResult, prompt_tokens: tuple[PromptToken, ...], *, now: float
) -> list[SequenceOutput]:
    """The news of a sequence that is about to fork, one output for each open choice; those that end by them are closed.

    First tokens that were known have been told; they are drawn a second time only where a hand-off broke off.
    """
    if parent.first_tokens:
        return []
    parent.learn_first_tokens(result.tokens, now=now)
    stats = parent.stats(now=now)
    outputs: list[SequenceOutput] = []
    for choice in parent.open_choices:
        token = parent.first_tokens[choice]
        reason = parent.request.sampling.finish_reason(token)
        outputs.append(
            SequenceOutput(
                parent.request_id,
                choice,
                tokens=(token,),
                prompt_tokens=() if outputs else prompt_tokens,
                finish_reason=reason,
                stats=None if reason is None else stats,
            )
        )
    parent.close([output.choice_index for output in outputs if output.finish_reason is not None])
    return outputs


def prefill_output(
    sequence: Sequence, result: SliceResult, prompt_tokens: tuple[PromptToken, ...], *, pool: BlockPool, now: float
) -> SequenceOutput:
    """The news of a prefill, one output for all choices; with its first tokens it is done."""
    if result.tokens:
        sequence.learn_first_tokens(result.tokens, now=now)
    return SequenceOutput(
        sequence.request_id,
        sequence.choices[0],
        tokens=result.tokens,
        prompt_tokens=prompt_tokens,
        final_blocks=_new_final_blocks(sequence, pool),
        stats=sequence.stats(now=now) if result.tokens else None,
    )


def _new_final_blocks(sequence: Sequence, pool: BlockPool) -> tuple[FinalBlock, ...]:
    """Blocks of a prefill that became final since the last call; the last one may be part full."""
    size, num_tokens = sequence.hasher.block_size, sequence.num_prompt_tokens
    is_complete = sequence.num_computed_tokens >= num_tokens
    num_final = sequence.num_prompt_blocks if is_complete else sequence.num_computed_tokens // size
    chain = sequence.chain(min(num_final, num_tokens // size))
    blocks = [
        FinalBlock(
            block_id=sequence.lease.table[index],
            block_index=index,
            num_tokens=min(size, num_tokens - index * size),
            generation=pool.generation(sequence.lease.table[index]),
            chain_hash=chain[index] if index < len(chain) else None,
        )
        for index in range(sequence.num_reported_blocks, num_final)
    ]
    sequence.num_reported_blocks = num_final
    return tuple(blocks)
