"""A sequence's part of a step as the runner gets it: tokens, blocks, what to draw, what to score. Changes nothing."""

from engine.sequence import Sequence
from engine.step import BlockCopy, Draw, Score, SequenceSlice


def slice_of(sequence: Sequence, start: int, end: int, copy: BlockCopy | None) -> SequenceSlice:
    """The slice of the positions [start, end); it draws when `end` is the end of what is known."""
    return SequenceSlice(
        request_id=sequence.request_id,
        token_ids=tuple(sequence.token_ids[start:end]),
        start=start,
        block_ids=sequence.block_ids(end),
        draw=_draw(sequence) if end == sequence.num_known_tokens else None,
        score=_score(sequence, start, end) if sequence.is_scoring else None,
        copy=copy,
    )


def _draw(sequence: Sequence) -> Draw:
    sampling = sequence.request.sampling
    if not sampling.is_penalised:
        return Draw(sampling, sequence.next_output_index, sequence.choices)
    # What was generated before a restart counts as output, though it came with the prompt.
    generated = tuple(sequence.token_ids[sequence.num_asked_tokens :])
    return Draw(sampling, sequence.next_output_index, sequence.choices, sequence.prompt_ids, generated)


def _score(sequence: Sequence, start: int, end: int) -> Score | None:
    """None when the slice says nothing new of the prompt."""
    first_unscored = sequence.num_scored_tokens
    end_of_targets = min(end + 1, sequence.num_asked_tokens)
    if end_of_targets <= first_unscored:
        return None
    num_alternatives = sequence.request.sampling.num_prompt_logprobs or 0
    return Score(tuple(sequence.token_ids[start + 1 : end_of_targets]), num_alternatives)
