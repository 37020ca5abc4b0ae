"""Prompt log-probabilities: every position once, in order, computed here or told with the first tokens."""

import pytest

from engine.cache.source import AttemptId
from engine.engine import Engine
from engine.fake import expected_prompt_tokens, expected_tokens
from engine.request import PromptToken, Request, RequestId, RequestKind, SequenceOutput
from engine.step import Score
from tests.engine.making import (
    RecordingRunner,
    make_engine,
    make_engine_with_source,
    make_limits,
    make_request,
    make_sampling,
    run_choices,
    step_choices,
)

FIRST = AttemptId(1)


def make_scored(
    name: str = "a",
    prompt: range | tuple[int, ...] = range(10),
    *,
    num_prompt_logprobs: int = 2,
    max_tokens: int = 3,
    kind: RequestKind = RequestKind.GENERATE,
    choices: tuple[int, ...] = (0,),
    first_token_index: int = 0,
    priority: int = 0,
) -> Request:
    sampling = make_sampling(max_tokens=max_tokens, num_prompt_logprobs=num_prompt_logprobs)
    return make_request(
        name,
        prompt,
        sampling=sampling,
        kind=kind,
        choices=choices,
        first_token_index=first_token_index,
        priority=priority,
    )


def make_recorded(
    *, num_blocks: int = 32, max_batch_tokens: int = 64, max_sequences: int = 8
) -> tuple[Engine, RecordingRunner]:
    runner = RecordingRunner()
    limits = make_limits(max_batch_tokens=max_batch_tokens, max_sequences=max_sequences)
    engine, _ = make_engine(num_blocks=num_blocks, limits=limits, runner=runner)
    return engine, runner


def told(outputs: list[SequenceOutput]) -> tuple[PromptToken, ...]:
    return tuple(token for each in outputs for token in each.prompt_tokens)


def test_every_position_but_the_first_is_told_with_its_alternatives() -> None:
    engine, runner = make_recorded()
    request = make_scored()
    engine.add(request)
    outputs = run_choices(engine)["a", 0]
    assert told(outputs) == expected_prompt_tokens(request) == outputs[0].prompt_tokens
    assert [token.position for token in told(outputs)] == list(range(1, 10))
    assert {len(token.top_logprobs) for token in told(outputs)} == {2}
    assert [each.score for each in runner.slices] == [Score(tuple(range(1, 10)), 2), None, None]


def test_chunks_score_across_their_borders_and_are_told_as_they_come() -> None:
    engine, runner = make_recorded(max_batch_tokens=4)
    request = make_scored(num_prompt_logprobs=0)
    engine.add(request)
    outputs = run_choices(engine)["a", 0]
    assert [each.score for each in runner.slices[:3]] == [
        Score((1, 2, 3, 4), 0),
        Score((5, 6, 7, 8), 0),
        Score((9,), 0),
    ]
    assert [[token.position for token in each.prompt_tokens] for each in outputs[:3]] == [
        [1, 2, 3, 4],
        [5, 6, 7, 8],
        [9],
    ]
    assert [len(each.tokens) for each in outputs[:3]] == [0, 0, 1]
    assert told(outputs) == expected_prompt_tokens(request)


def test_a_last_chunk_of_one_token_scores_nothing() -> None:
    engine, runner = make_recorded(max_batch_tokens=9)
    engine.add(make_scored())
    run_choices(engine)
    assert [len(each.score.targets) if each.score else 0 for each in runner.slices[:2]] == [9, 0]


def test_a_prompt_of_one_token_has_nothing_to_score() -> None:
    engine, runner = make_recorded()
    engine.add(make_scored(prompt=(5,)))
    assert told(run_choices(engine)["a", 0]) == ()
    assert {each.score for each in runner.slices} == {None}


def test_who_does_not_ask_is_told_nothing() -> None:
    engine, runner = make_recorded()
    engine.add(make_request("a"))
    assert told(run_choices(engine)["a", 0]) == ()
    assert {each.score for each in runner.slices} == {None}


@pytest.mark.parametrize("kind", [RequestKind.GENERATE, RequestKind.PREFILL])
def test_a_prefix_hit_is_not_taken_because_it_brings_no_logits(kind: RequestKind) -> None:
    engine, runner = make_recorded()
    engine.add(make_request("warm", range(10), sampling=make_sampling(max_tokens=1)))
    run_choices(engine)
    request = make_scored(kind=kind, max_tokens=1)
    engine.add(request)
    outputs = run_choices(engine)["a", 0]
    assert runner.runs[-1] == [("a", 0, 10)]
    assert told(outputs) == expected_prompt_tokens(request)
    assert outputs[-1].stats is not None and outputs[-1].stats.num_cached_tokens == 0


def test_a_prefill_tells_them_in_its_output_with_blocks_and_tokens() -> None:
    engine, _ = make_recorded(max_batch_tokens=8)
    request = make_scored(kind=RequestKind.PREFILL, choices=(0, 1))
    engine.add(request)
    outputs = run_choices(engine)["a", 0]
    assert [(len(each.prompt_tokens), len(each.final_blocks), len(each.tokens)) for each in outputs] == [
        (8, 2, 0),
        (1, 1, 2),
    ]
    assert told(outputs) == expected_prompt_tokens(request)


def test_they_come_once_with_the_first_choice() -> None:
    engine, _ = make_recorded(max_batch_tokens=6)
    request = make_scored(choices=(1, 3))
    engine.add(request)
    outputs = run_choices(engine)
    assert told(outputs["a", 1]) == expected_prompt_tokens(request)
    assert told(outputs["a", 3]) == ()


def test_a_prompt_that_is_recomputed_half_way_goes_on_telling_where_it_was() -> None:
    engine, runner = make_recorded(max_batch_tokens=4)
    request = make_scored(prompt=range(12), max_tokens=2)
    engine.add(request)
    collected = [step_choices(engine)["a", 0], step_choices(engine)["a", 0]]
    (sequence,) = engine._live.of(RequestId("a"))
    engine._scheduler._preempt(sequence)
    collected += run_choices(engine)["a", 0]
    assert told(collected) == expected_prompt_tokens(request)
    # No hit, though both blocks are in the prefix cache; and what was told is not scored again.
    assert [(each.start, None if each.score is None else len(each.score.targets)) for each in runner.slices] == [
        (0, 4),
        (4, 4),
        (0, None),
        (4, None),
        (8, 3),
        (12, None),
    ]


def test_after_the_last_position_is_told_prefix_hits_are_taken_again() -> None:
    engine, runner = make_recorded()
    engine.add(make_scored(max_tokens=4))
    step_choices(engine)
    (sequence,) = engine._live.of(RequestId("a"))
    engine._scheduler._preempt(sequence)
    step_choices(engine)
    assert runner.runs[1] == [("a", 8, 3)]


def test_tokens_generated_before_a_restart_are_not_scored() -> None:
    engine, runner = make_recorded()
    request = make_scored(prompt=range(6), first_token_index=2, max_tokens=5)
    engine.add(request)
    assert told(run_choices(engine)["a", 0]) == expected_prompt_tokens(request)
    assert runner.slices[0].score == Score((1, 2, 3), 2)


def test_first_tokens_from_elsewhere_say_that_the_prompt_was_told_there() -> None:
    engine, _, source = make_engine_with_source(max_attempts=1)
    request = make_scored(choices=(0, 1))
    engine.add(request)
    step_choices(engine)
    source.ready(FIRST)
    step_choices(engine)
    source.send_first_tokens(FIRST)
    source.fail(FIRST)
    source.quiesce(FIRST)
    outputs = run_choices(engine)
    assert [told(each) for each in outputs.values()] == [(), ()]
    for (_, choice), each in outputs.items():
        tokens = [token for output in each for token in output.tokens]
        assert tokens == list(expected_tokens(request, choice))[1:]


def test_a_hand_off_that_fails_before_its_first_tokens_leaves_all_positions_to_be_told_here() -> None:
    engine, _, source = make_engine_with_source(max_attempts=1)
    engine.add(make_request("warm", range(8), sampling=make_sampling(max_tokens=1)))
    source.offering = {RequestId("a")}
    run_choices(engine)
    request = make_scored()
    engine.add(request)
    step_choices(engine)
    assert source.lookups[-1] == ("a", 0, 10)  # though the prefix cache holds two blocks
    source.ready(FIRST)
    step_choices(engine)
    assert len(source.attempts[FIRST].block_ids or ()) == 3
    source.land(FIRST, 8)
    source.fail(FIRST)
    source.quiesce(FIRST)
    outputs = run_choices(engine)["a", 0]
    assert told(outputs) == expected_prompt_tokens(request)
    stats = outputs[-1].stats
    assert stats is not None and (stats.num_local_prompt_tokens, stats.num_recomputed_tokens) == (2, 8)
    assert engine.counts().held_blocks == 0
