"""Several choices of one request: one prompt, then blocks shared and copied when they are written into."""

from collections import Counter

import pytest

from engine.cache.pool import IntegrityError
from engine.engine import Engine
from engine.fake import FakeRunner, expected_tokens
from engine.request import FinishReason, Request, RequestId, RequestKind, SequenceOutput, SequenceStats
from engine.sequence import SequenceId
from engine.step import BlockCopy, Draw, SequenceSlice, SliceResult
from staffetta.errors import InvalidRequestError, QueueFullError, StepFailedError
from tests.engine.making import (
    BLOCK_SIZE,
    RecordingRunner,
    make_engine,
    make_limits,
    make_pacer,
    make_request,
    make_sampling,
    reason,
    run_choices,
    step_choices,
    token_ids,
)

THREE = (0, 1, 2)


def make_recorded(
    *, num_blocks: int = 32, max_sequences: int = 8, prefix_caching: bool = True
) -> tuple[Engine, RecordingRunner]:
    runner = RecordingRunner()
    limits = make_limits(max_sequences=max_sequences, prefix_caching=prefix_caching)
    engine, _ = make_engine(num_blocks=num_blocks, limits=limits, runner=runner)
    return engine, runner


def wanted(request: Request, choice: int) -> list[int]:
    return [token.token_id for token in expected_tokens(request, choice)]


def assert_as_wanted(request: Request, outputs: dict[tuple[str, int], list[SequenceOutput]]) -> None:
    for choice in request.choices:
        assert token_ids(outputs[request.request_id, choice]) == wanted(request, choice)


def stats_of(outputs: list[SequenceOutput]) -> SequenceStats:
    stats = outputs[-1].stats
    assert stats is not None
    return stats


def test_every_choice_draws_tokens_of_its_own_after_one_prompt() -> None:
    engine, runner = make_recorded()
    request = make_request("a", range(6), choices=THREE)
    engine.add(request)
    outputs = run_choices(engine)
    assert_as_wanted(request, outputs)
    assert len({tuple(wanted(request, choice)) for choice in THREE}) == 3
    assert [reason(outputs["a", choice]) for choice in THREE] == [FinishReason.LENGTH] * 3
    assert runner.runs == [[("a", 0, 6)]] + [[("a", position, 1)] * 3 for position in range(6, 10)]
    assert engine.counts().held_blocks == 0 and not engine.has_work()


def test_all_but_the_last_holder_copy_the_part_full_block_they_write_into() -> None:
    engine, runner = make_recorded()
    engine.add(make_request("a", range(6), choices=THREE))
    step_choices(engine)
    assert engine.counts().held_blocks == 2
    step_choices(engine)
    forks = runner.slices[1:]
    assert [(each.block_ids, each.copy) for each in forks] == [
        ((0, 2), BlockCopy(1, 2)),  # type: ignore[arg-type]
        ((0, 3), BlockCopy(1, 3)),  # type: ignore[arg-type]
        ((0, 1), None),
    ]
    assert [each.draw for each in forks] == [Draw(make_sampling(), 1, (choice,)) for choice in THREE]
    assert engine.counts().held_blocks == 4
    step_choices(engine)
    assert [each.copy for each in runner.slices[4:]] == [None] * 3
    assert engine.counts().num_copied_blocks == 2


@pytest.mark.parametrize("num_prompt_tokens", [4, 8])
def test_a_prompt_of_whole_blocks_is_shared_without_a_copy(num_prompt_tokens: int) -> None:
    engine, runner = make_recorded()
    request = make_request("a", range(num_prompt_tokens), choices=THREE)
    engine.add(request)
    outputs = run_choices(engine)
    assert_as_wanted(request, outputs)
    assert {each.copy for each in runner.slices} == {None}
    num_shared = num_prompt_tokens // BLOCK_SIZE
    assert {each.block_ids[:num_shared] for each in runner.slices} == {tuple(range(num_shared))}


def test_a_choice_that_waits_keeps_the_block_and_the_last_holder_writes_in_place() -> None:
    engine, runner = make_recorded()
    request = make_request("a", range(6), choices=THREE, credit=1)
    engine.add(request)
    run_choices(engine)
    for choice, copies in ((1, [BlockCopy(1, 2)]), (0, [BlockCopy(1, 3)]), (2, [None])):  # type: ignore[arg-type]
        runner.slices.clear()
        engine.grant(RequestId("a"), choice, 1)
        outputs = step_choices(engine)
        assert [each.copy for each in runner.slices] == copies
        assert {key: token_ids([output]) for key, output in outputs.items()} == {
            ("a", choice): wanted(request, choice)[1:2]
        }


def test_a_choice_that_ends_with_its_first_token_never_runs() -> None:
    engine, runner = make_recorded()
    free = make_request("a", range(6), choices=THREE)
    stop = frozenset({wanted(free, 1)[0]})
    request = make_request("a", range(6), choices=THREE, sampling=make_sampling(stop=stop))
    engine.add(request)
    first = step_choices(engine)
    assert [first["a", choice].finish_reason for choice in THREE] == [None, FinishReason.STOP, None]
    assert first["a", 1].stats is not None
    step_choices(engine)
    assert [each.copy for each in runner.slices[1:]] == [BlockCopy(1, 2), None]  # type: ignore[arg-type]


def test_when_every_choice_ends_with_its_first_token_the_request_is_over() -> None:
    engine, runner = make_recorded()
    engine.add(make_request("a", range(6), choices=THREE, sampling=make_sampling(max_tokens=1)))
    outputs = step_choices(engine)
    assert [(key, each.finish_reason) for key, each in outputs.items()] == [
        (("a", choice), FinishReason.LENGTH) for choice in THREE
    ]
    assert (engine.counts().held_blocks, engine.has_work(), len(runner.slices)) == (0, False, 1)
    engine.add(make_request("a"))  # the id is free again


def test_the_choice_index_and_not_its_rank_keys_the_draws() -> None:
    engine, _ = make_engine()
    request = make_request("a", range(6), choices=(2, 5))
    lone = make_request("b", range(6), choices=(5,))
    engine.add(request)
    engine.add(lone)
    outputs = run_choices(engine)
    assert_as_wanted(request, outputs)
    assert token_ids(outputs["b", 5]) == token_ids(outputs["a", 5])


def test_a_restarted_choice_goes_on_with_its_own_draws() -> None:
    engine, _ = make_engine()
    whole = make_request("a", range(6), choices=THREE, sampling=make_sampling(presence_penalty=0.5))
    head = tuple(wanted(whole, 2)[:3])
    engine.add(
        make_request("a", (*range(6), *head), sampling=whole.sampling, first_token_index=3, choices=(2,)),
    )
    outputs = run_choices(engine)
    assert [*head, *token_ids(outputs["a", 2])] == wanted(whole, 2)


def test_penalties_are_given_the_prompt_and_what_was_generated_also_before_a_restart() -> None:
    engine, runner = make_recorded()
    sampling = make_sampling(max_tokens=4, repetition_penalty=1.5)
    engine.add(make_request("a", (8, 7, 8, 9), sampling=sampling, first_token_index=1))
    engine.add(make_request("b", (7, 8, 9)))
    step_choices(engine)
    assert [each.draw for each in runner.slices] == [
        Draw(sampling, 1, (0,), (7, 8), (9,)),
        Draw(make_sampling(), 0, (0,)),
    ]
    drawn = wanted(make_request("a", (8, 7, 8, 9), sampling=sampling, first_token_index=1), 0)[0]
    step_choices(engine)
    assert runner.slices[2].draw == Draw(sampling, 2, (0,), (7, 8), (9, drawn))


def test_penalties_of_the_output_alone_are_not_given_the_prompt() -> None:
    engine, runner = make_recorded()
    sampling = make_sampling(max_tokens=4, presence_penalty=0.5)
    engine.add(make_request("a", (7, 8, 9), sampling=sampling, first_token_index=1))
    step_choices(engine)
    assert runner.slices[0].draw == Draw(sampling, 1, (0,), (), (9,))


def test_a_prefill_stays_one_sequence_and_has_one_output_with_all_first_tokens() -> None:
    engine, _ = make_engine()
    request = make_request("p", range(6), choices=THREE, kind=RequestKind.PREFILL)
    engine.add(request)
    outputs = step_choices(engine)
    assert list(outputs) == [("p", 0)]
    assert [token.token_id for token in outputs["p", 0].tokens] == [wanted(request, choice)[0] for choice in THREE]
    assert outputs["p", 0].stats is not None
    assert (engine.counts().num_held, engine.counts().held_blocks) == (1, 2)
    assert engine.step() is None
    engine.release(RequestId("p"))
    assert engine.counts().held_blocks == 0


def test_credit_is_counted_by_choice_also_before_the_fork() -> None:
    engine, _ = make_engine()
    request = make_request("a", range(6), choices=THREE, credit=0)
    engine.add(request)
    engine.grant(RequestId("a"), 0, 2)
    engine.grant(RequestId("a"), 1, 1)
    assert run_choices(engine) == {}  # choice 2 may not have its first token yet
    engine.grant(RequestId("a"), 2, 3)
    engine.grant(RequestId("a"), 9, 100)  # not a choice of this request
    outputs = run_choices(engine)
    assert [len(token_ids(outputs["a", choice])) for choice in THREE] == [2, 1, 3]
    for choice in THREE:
        engine.grant(RequestId("a"), choice, 9)
    for key, more in run_choices(engine).items():
        outputs[key] += more
    assert_as_wanted(request, outputs)


def test_a_cancel_before_the_fork_ends_every_choice_and_after_it_those_without_an_ending() -> None:
    engine, _ = make_engine(limits=make_limits(max_batch_tokens=4))
    engine.add(make_request("a", range(6), choices=THREE))
    step_choices(engine)
    engine.cancel(RequestId("a"))
    outputs = step_choices(engine)
    assert {key: each.finish_reason for key, each in outputs.items()} == {
        ("a", choice): FinishReason.CANCELLED for choice in THREE
    }
    free = make_request("b", range(6), choices=THREE)
    stop = frozenset({wanted(free, 1)[0]})
    engine.add(make_request("b", range(6), choices=THREE, sampling=make_sampling(stop=stop)))
    step_choices(engine)
    step_choices(engine)
    engine.cancel(RequestId("b"))
    engine.cancel(RequestId("b"))
    outputs = step_choices(engine)
    assert {key: each.finish_reason for key, each in outputs.items()} == {
        ("b", choice): FinishReason.CANCELLED for choice in (0, 2)
    }
    assert engine.counts().held_blocks == 0 and not engine.has_work()


def test_a_step_that_fails_for_the_prompt_ends_every_choice_and_for_one_choice_that_one_alone() -> None:
    engine, runner = make_engine()
    runner.failing = {RequestId("a")}
    engine.add(make_request("a", range(6), choices=THREE))
    outputs = step_choices(engine)
    assert [type(outputs["a", choice].error) for choice in THREE] == [StepFailedError] * 3
    request = make_request("b", range(20, 26), choices=THREE)
    engine.add(request)
    collected = {key: [output] for key, output in step_choices(engine).items()}
    runner.failing = {SequenceId(RequestId("b"), 0)}
    for key, more in run_choices(engine).items():
        collected[key] += more
    assert [reason(collected["b", choice]) for choice in THREE] == [
        FinishReason.ERROR,
        FinishReason.LENGTH,
        FinishReason.LENGTH,
    ]
    # The others copied the block again when the step was repeated in halves.
    for choice in (1, 2):
        assert token_ids(collected["b", choice]) == wanted(request, choice)
    assert engine.counts().held_blocks == 0


class InterruptedRunner(RecordingRunner):
    """Raises KeyboardInterrupt once, after its second run."""

    def run(self, slices: tuple[SequenceSlice, ...]) -> list[SliceResult]:
        results = super().run(slices)
        if len(self.runs) == 2:
            raise KeyboardInterrupt
        return results


def test_an_interrupted_step_gives_replaced_blocks_back_and_copies_again() -> None:
    runner = InterruptedRunner()
    engine, _ = make_engine(runner=runner)
    request = make_request("a", range(6), choices=THREE)
    engine.add(request)
    collected = {key: [output] for key, output in step_choices(engine).items()}
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine.check_integrity()
    assert engine.counts().held_blocks == 2
    for key, more in run_choices(engine).items():
        collected[key] += more
    assert_as_wanted(request, collected)
    copies = [each.copy for each in runner.slices if each.copy is not None]
    assert Counter(copy.source for copy in copies) == {1: 4}
    assert engine.counts().num_copied_blocks == 2


def test_what_the_prompt_cost_is_told_by_every_choice_alike() -> None:
    now = iter(range(0, 10**6, 5))
    runner = FakeRunner(block_size=BLOCK_SIZE)
    engine, _ = make_engine(runner=runner)
    engine._clock = engine._scheduler._clock = lambda: float(next(now))
    engine.add(make_request("w", range(4), sampling=make_sampling(max_tokens=1)))
    run_choices(engine)
    engine.add(make_request("a", range(6), choices=THREE))
    outputs = run_choices(engine)
    told = {
        (each.num_cached_tokens, each.num_local_prompt_tokens, each.queue_s > 0, each.queue_s, each.prefill_s)
        for each in map(stats_of, (outputs["a", choice] for choice in THREE))
    }
    assert [(cached, local, waited) for cached, local, waited, _, _ in told] == [(4, 2, True)]


def test_a_preempted_choice_is_recomputed_alone_and_says_so() -> None:
    engine, _ = make_recorded(num_blocks=6)
    request = make_request("a", range(6), choices=THREE, sampling=make_sampling(max_tokens=12))
    engine.add(request)
    outputs = run_choices(engine)
    assert_as_wanted(request, outputs)
    stats = [stats_of(outputs["a", choice]) for choice in THREE]
    assert [each.num_preemptions > 0 for each in stats] == [False, True, True]
    assert [each.num_recomputed_tokens > 0 for each in stats] == [False, True, True]
    assert {each.num_local_prompt_tokens for each in stats} == {6}


def test_what_happened_before_the_fork_is_told_by_every_choice_and_what_came_after_by_one() -> None:
    engine, _ = make_engine(limits=make_limits(max_batch_tokens=4, prefix_caching=False))
    request = make_request("a", range(6), choices=THREE)
    engine.add(request)
    step_choices(engine)
    engine._scheduler._preempt(engine._live.of(RequestId("a"))[0])
    step_choices(engine)
    collected = {key: [output] for key, output in step_choices(engine).items()}
    engine._scheduler._preempt(engine._live.of(RequestId("a"))[2])
    for key, more in run_choices(engine).items():
        collected[key] += more
    assert_as_wanted(request, collected)
    stats = [stats_of(collected["a", choice]) for choice in THREE]
    assert [(each.num_preemptions, each.num_recomputed_tokens) for each in stats] == [(1, 4), (1, 4), (2, 10)]
    assert [each.num_local_prompt_tokens for each in stats] == [6, 6, 6]


def test_a_single_choice_takes_back_all_that_its_siblings_hold_when_it_must() -> None:
    # Five blocks are just what one choice needs in the end.
    engine, _ = make_recorded(num_blocks=5, prefix_caching=False)
    request = make_request("a", range(10), choices=(0, 1, 2, 3), sampling=make_sampling(max_tokens=11))
    engine.add(request)
    outputs = run_choices(engine)
    assert_as_wanted(request, outputs)
    assert engine.counts().free_blocks == 5


def test_a_paused_sibling_that_comes_first_gives_way_when_nothing_else_can_run() -> None:
    # Two blocks hold the prompt: choice 1 can only go on in place, once choice 0 has let go of the second.
    engine, runner = make_recorded(num_blocks=2)
    request = make_request("a", range(6), choices=(0, 1), credit=1, sampling=make_sampling(max_tokens=3))
    engine.add(request)
    collected = run_choices(engine)
    engine.grant(RequestId("a"), 1, 5)
    for key, more in run_choices(engine).items():
        collected[key] += more
    assert token_ids(collected["a", 1]) == wanted(request, 1)
    assert {each.copy for each in runner.slices} == {None}
    engine.grant(RequestId("a"), 0, 5)
    for key, more in run_choices(engine).items():
        collected[key] += more
    assert_as_wanted(request, collected)
    assert stats_of(collected["a", 0]).num_preemptions == 1


def test_more_choices_than_sequences_in_a_step_take_turns() -> None:
    engine, runner = make_recorded(max_sequences=2)
    request = make_request("a", range(6), choices=(0, 1, 2, 3, 4))
    engine.add(request)
    outputs = run_choices(engine)
    assert_as_wanted(request, outputs)
    assert max(len(run) for run in runner.runs) == 2


def test_max_requests_counts_choices_until_they_have_ended() -> None:
    engine, _ = make_engine(limits=make_limits(max_requests=4))
    free = make_request("a", range(6), choices=THREE)
    stop = frozenset({wanted(free, 1)[0]})
    engine.add(make_request("a", range(6), choices=THREE, sampling=make_sampling(stop=stop)))
    with pytest.raises(QueueFullError, match="holds 3 requests, a choice counted as one, and may hold 4"):
        engine.add(make_request("b", choices=(0, 1)))
    engine.add(make_request("c"))
    ended = [key for key, output in step_choices(engine).items() if output.finish_reason is not None]
    assert ended == [("a", 1)]
    engine.add(make_request("d"))
    with pytest.raises(QueueFullError):
        engine.add(make_request("e"))
    run_choices(engine)
    engine.add(make_request("b", choices=(0, 1, 2, 3)))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (make_request("x", choices=()), r"choices are \(\)"),
        (make_request("x", choices=(1, 1)), r"choices are \(1, 1\)"),
        (make_request("x", choices=(1, 0)), r"choices are \(1, 0\)"),
        (make_request("x", choices=(-1, 0)), r"choices are \(-1, 0\)"),
        (make_request("x", choices=(0, 1, 2, 3, 4)), "5 choices .* at most 4"),
        (make_request("x", choices=(0, 1), first_token_index=1), "one choice alone can be restarted"),
    ],
)
def test_choices_that_can_never_be_served_are_refused(request_: Request, message: str) -> None:
    engine, _ = make_engine(limits=make_limits(max_requests=4))
    with pytest.raises(InvalidRequestError, match=message):
        engine.add(request_)
    assert not engine.has_work()


def test_writing_into_a_block_that_others_hold_is_a_defect_that_is_noticed() -> None:
    engine, _ = make_engine()
    engine.add(make_request("a", range(6), choices=(0, 1)))
    step_choices(engine)
    plan = engine._scheduler.schedule(engine._scheduler.snapshot(make_pacer(), num_granted=0))
    assert [part.copied for part in plan.slices] == [1, None]
    with pytest.raises(IntegrityError, match="a/1 would write into block 1, which others hold"):
        engine._scheduler.apply(type(plan)(slices=plan.slices[1:]))


def test_a_shared_block_that_one_of_its_holders_changed_is_a_contradiction() -> None:
    engine, _ = make_engine()
    engine.add(make_request("a", range(6), choices=(0, 1)))
    step_choices(engine)
    next(iter(engine._live)).num_computed_tokens += 1
    with pytest.raises(IntegrityError, match="block 1 is shared by a/1 and changed by one only"):
        engine.check_integrity()
