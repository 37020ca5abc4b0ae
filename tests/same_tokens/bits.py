"""The bits of an answer, and the first place where two answers differ: what the system-level proof compares."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tests.e2e.reflected import Choices


class TokenBits(NamedTuple):
    """One token. Log-probabilities as `float.hex` writes them: equal text is equal bits, the sign of 0 included."""

    token_id: int
    logprob: str
    top_logprobs: tuple[tuple[int, str], ...]


class ChoiceBits(NamedTuple):
    """One choice, or the rest of it after a restart."""

    tokens: tuple[TokenBits, ...]
    finish_reason: str


class AnswerBits(NamedTuple):
    """One answer: the prompt's tokens from position 1 on, where they are scored, and the choices in order."""

    prompt: tuple[TokenBits, ...]
    choices: tuple[ChoiceBits, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that have a log-probability: scored ones of the prompt, and those of every choice."""
        return len(self.prompt) + sum(len(choice.tokens) for choice in self.choices)


def make_bits(token_id: int, logprob: float, top_logprobs: Iterable[tuple[int, float]]) -> TokenBits:
    """One token."""
    return TokenBits(token_id, logprob.hex(), tuple((other, value.hex()) for other, value in top_logprobs))


def make_token(token_id: int) -> TokenBits:
    """One token without a log-probability."""
    return TokenBits(token_id, "", ())


def tokens_of(choices: Choices) -> AnswerBits:
    """An answer as a client saw it who asked for no log-probabilities."""
    assert not any(answer.logprobs for answer in choices.answers), "log-probabilities came that nobody asked for"
    return AnswerBits(
        (),
        tuple(ChoiceBits(tuple(map(make_token, answer.token_ids)), answer.finish_reason) for answer in choices.answers),
    )


def without_logprobs(answer: AnswerBits) -> AnswerBits:
    """The same answer, had no log-probabilities been asked for."""
    return AnswerBits(
        (),
        tuple(
            ChoiceBits(tuple(make_token(token.token_id) for token in choice.tokens), choice.finish_reason)
            for choice in answer.choices
        ),
    )


def bits_of(choices: Choices) -> AnswerBits:
    """An answer as a client saw it, with a log-probability for each of its tokens."""
    return AnswerBits(
        tuple(make_bits(*token) for token in choices.prompt_tokens),
        tuple(
            ChoiceBits(
                tuple(
                    make_bits(*token)
                    for token in zip(answer.token_ids, answer.logprobs, answer.top_logprobs, strict=True)
                ),
                answer.finish_reason,
            )
            for answer in choices.answers
        ),
    )


def first_difference(
    requests: Sequence[object], actual: Sequence[AnswerBits], expected: Sequence[AnswerBits]
) -> str | None:
    """The first place where two runs of the same requests differ, in words; None where there is none."""
    for number, (asked, got, wanted) in enumerate(zip(requests, actual, expected, strict=True)):
        difference = _in_tokens(got.prompt, wanted.prompt)
        if difference:
            return f"request {number} ({asked}), prompt: {difference}"
        if len(got.choices) != len(wanted.choices):
            return f"request {number} ({asked}): {len(got.choices)} choices instead of {len(wanted.choices)}"
        for index, (choice, other) in enumerate(zip(got.choices, wanted.choices, strict=True)):
            difference = _in_choice(choice, other)
            if difference:
                return f"request {number} ({asked}), choice {index}: {difference}"
    return None


def _in_choice(got: ChoiceBits, wanted: ChoiceBits) -> str | None:
    difference = _in_tokens(got.tokens, wanted.tokens)
    if difference is None and got.finish_reason != wanted.finish_reason:
        return f"ended by {got.finish_reason} instead of {wanted.finish_reason}"
    return difference


def _in_tokens(got: Sequence[TokenBits], wanted: Sequence[TokenBits]) -> str | None:
    for index, (token, other) in enumerate(zip(got, wanted, strict=False)):
        if token != other:
            return f"token {index}: {tuple(token)} instead of {tuple(other)}"
    return None if len(got) == len(wanted) else f"{len(got)} tokens instead of {len(wanted)}"
