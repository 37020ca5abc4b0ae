"""What each step computes, whose blocks are taken, and planning one step while another runs."""

import pytest

from engine.cache.lease import BlockLease
from engine.cache.pool import BlockPool, IntegrityError
from engine.cache.prefix import PrefixCache
from engine.engine import Engine
from engine.fake import FakeRunner, expected_tokens
from engine.forking import fork
from engine.planning import EngineLimits, PlannedSlice, StepPlan
from engine.reporting import first_outputs
from engine.request import Request, RequestId, RequestKind, SampledToken
from engine.scheduler import Scheduler, SliceOutcome
from engine.sequence import Sequence, SequenceId, SequenceState
from engine.step import Draw, SliceResult
from staffetta.errors import StepFailedError
from tests.engine.making import (
    BLOCK_SIZE,
    RecordingRunner,
    make_engine,
    make_hasher,
    make_limits,
    make_pacer,
    make_prefill,
    make_request,
    make_sampling,
    run_to_end,
    step,
    token_ids,
)


def make_recorded(
    *, num_blocks: int = 32, max_batch_tokens: int = 64, max_sequences: int = 8, prefix_caching: bool = True
) -> tuple[Engine, RecordingRunner]:
    runner = RecordingRunner()
    limits = make_limits(max_batch_tokens=max_batch_tokens, max_sequences=max_sequences, prefix_caching=prefix_caching)
    engine, _ = make_engine(num_blocks=num_blocks, limits=limits, runner=runner)
    return engine, runner


def wanted(request: Request) -> list[int]:
    return [token.token_id for token in expected_tokens(request)]


def test_one_token_sequences_come_before_chunks_of_prompts() -> None:
    engine, runner = make_recorded(max_batch_tokens=8)
    engine.add(make_request("long", range(20)))
    step(engine)
    engine.add(make_request("short", range(50, 52)))
    for _ in range(4):
        step(engine)
    assert runner.runs == [
        [("long", 0, 8)],
        [("long", 8, 8)],
        [("long", 16, 4), ("short", 0, 2)],
        [("long", 20, 1), ("short", 2, 1)],
        [("long", 21, 1), ("short", 3, 1)],
    ]


def test_a_prompt_that_arrives_takes_what_decoding_leaves_of_the_budget() -> None:
    engine, runner = make_recorded(max_batch_tokens=4)
    engine.add(make_request("first", range(3)))
    step(engine)
    engine.add(make_request("second", range(50, 60)))
    step(engine)
    assert runner.runs[1] == [("first", 3, 1), ("second", 0, 3)]


def test_higher_priority_joins_first_then_earlier_arrival() -> None:
    engine, runner = make_recorded(max_sequences=1)
    for name, priority in (("a", 0), ("b", 0), ("c", 1)):
        engine.add(make_request(name, range(3), priority=priority, sampling=make_sampling(max_tokens=1)))
    run_to_end(engine)
    assert [run[0][0] for run in runner.runs] == ["c", "a", "b"]


def test_a_step_computes_at_most_as_many_sequences_as_it_may() -> None:
    engine, runner = make_recorded(max_sequences=2)
    for number in range(5):
        engine.add(make_request(f"r{number}", range(3)))
    run_to_end(engine)
    assert {len(run) for run in runner.runs} <= {1, 2}


def test_chunks_of_a_prefill_end_on_block_boundaries_but_the_last() -> None:
    engine, runner = make_recorded(max_batch_tokens=10)
    engine.add(make_prefill("p", range(21)))
    run_to_end(engine)
    assert runner.runs == [[("p", 0, 8)], [("p", 8, 8)], [("p", 16, 5)]]


def test_a_budget_smaller_than_a_block_still_gets_a_prefill_done() -> None:
    engine, runner = make_recorded(max_batch_tokens=3)
    engine.add(make_prefill("p", range(9)))
    run_to_end(engine)
    assert runner.runs == [[("p", 0, 3)], [("p", 3, 1)], [("p", 4, 3)], [("p", 7, 2)]]


def test_a_prefill_takes_all_its_blocks_at_once_or_waits() -> None:
    engine, runner = make_recorded(num_blocks=6, max_batch_tokens=4)
    engine.add(make_prefill("p", range(12)))
    engine.add(make_prefill("q", range(20, 36)))
    step(engine)
    assert engine.counts().held_blocks == 3
    run_to_end(engine)
    assert [run[0][0] for run in runner.runs] == ["p"] * 3
    engine.release(RequestId("p"))
    run_to_end(engine)
    assert [run[0][0] for run in runner.runs] == ["p"] * 3 + ["q"] * 4


def test_the_latest_of_the_lowest_priority_is_preempted() -> None:
    engine, _ = make_recorded(num_blocks=10)
    requests = [
        make_request("important", range(4), priority=1, sampling=make_sampling(max_tokens=14)),
        make_request("early", range(20, 24), sampling=make_sampling(max_tokens=14)),
        make_request("late", range(40, 44), sampling=make_sampling(max_tokens=14)),
    ]
    for request in reversed(requests):
        engine.add(request)
    outputs = run_to_end(engine)
    preemptions = {name: outputs[name][-1].stats.num_preemptions for name in outputs}  # type: ignore[union-attr]
    assert preemptions["important"] == 0
    assert 0 == preemptions["early"] < preemptions["late"]
    for request in requests:
        assert token_ids(outputs[request.request_id]) == wanted(request)


def test_a_sequence_never_takes_blocks_of_one_that_comes_before_it() -> None:
    engine, runner = make_recorded(num_blocks=5)
    engine.add(make_request("early", range(9), sampling=make_sampling(max_tokens=4)))
    engine.add(make_request("late", range(20, 27), sampling=make_sampling(max_tokens=3)))
    outputs = run_to_end(engine)
    assert [outputs[name][-1].stats.num_preemptions for name in outputs] == [0, 0]  # type: ignore[union-attr]
    # The late one lacks a third block at position 8 and waits for the end of the early one.
    assert [[name for name, _, _ in run] for run in runner.runs] == [["early", "late"]] * 2 + [["early"]] * 2 + [
        ["late"]
    ]


def test_a_preempted_sequence_takes_back_what_the_prefix_cache_kept() -> None:
    engine, runner = make_recorded(num_blocks=5)
    first = make_request("first", range(7), sampling=make_sampling(max_tokens=10))
    second = make_request("second", range(20, 27), sampling=make_sampling(max_tokens=6))
    engine.add(first)
    engine.add(second)
    outputs = run_to_end(engine)
    assert token_ids(outputs["second"]) == wanted(second)
    resumed = [part for run in runner.runs for part in run if part[0] == "second" and part[1] > 0 and part[2] > 1]
    assert len(resumed) == 1 and resumed[0][1] % BLOCK_SIZE == 0


def test_a_prefill_is_never_preempted() -> None:
    engine, runner = make_recorded(num_blocks=6, max_batch_tokens=5)
    engine.add(make_request("a", range(4), priority=1, sampling=make_sampling(max_tokens=16)))
    engine.add(make_prefill("p", range(20, 36)))
    run_to_end(engine)
    assert engine.counts().num_held == 1
    starts = [start for run in runner.runs for name, start, _ in run if name == "p"]
    assert starts == sorted(set(starts))
    engine.release(RequestId("p"))
    assert engine.step() is not None


def test_nobody_overtakes_a_sequence_that_waits_for_blocks() -> None:
    engine, runner = make_recorded(num_blocks=4)
    engine.add(make_prefill("held", range(8)))
    step(engine)
    engine.add(make_prefill("big", range(20, 32)))
    engine.add(make_prefill("small", range(40, 44)))
    assert engine.step() is None
    engine.release(RequestId("held"))
    step(engine)
    assert runner.runs[-1] == [("big", 0, 12), ("small", 0, 4)]


def test_a_paused_sequence_keeps_its_blocks_while_others_find_room() -> None:
    engine, _ = make_recorded(num_blocks=4)
    paused = make_request("paused", range(4), credit=1)
    engine.add(paused)
    run_to_end(engine)
    held = engine.counts().held_blocks
    engine.add(make_request("b", range(20, 24), sampling=make_sampling(max_tokens=2)))
    run_to_end(engine)
    assert (held, engine.counts().held_blocks) == (1, 1)


def test_a_paused_sequence_gives_way_when_nothing_else_can_run() -> None:
    engine, _ = make_recorded(num_blocks=4)
    paused = make_request("paused", range(7), credit=1)
    engine.add(paused)
    outputs = run_to_end(engine)
    other = make_request("other", range(20, 34), sampling=make_sampling(max_tokens=3))
    engine.add(other)
    assert token_ids(run_to_end(engine)["other"]) == wanted(other)
    engine.grant(RequestId("paused"), 0, 10)
    outputs["paused"] += run_to_end(engine)["paused"]
    assert token_ids(outputs["paused"]) == wanted(paused)
    stats = outputs["paused"][-1].stats
    assert stats is not None and stats.num_preemptions == 1


def test_nothing_is_taken_from_the_paused_while_it_would_not_be_enough() -> None:
    engine, _ = make_recorded(num_blocks=4)
    engine.add(make_request("paused", range(4), credit=1))
    engine.add(make_prefill("held", range(20, 28)))
    run_to_end(engine)
    engine.add(make_prefill("big", range(40, 56)))
    assert run_to_end(engine) == {}
    assert engine.counts().held_blocks == 3


def test_two_sequences_that_join_together_share_what_the_cache_holds() -> None:
    engine, runner = make_recorded(num_blocks=5)
    engine.add(make_request("a", range(12), sampling=make_sampling(max_tokens=1)))
    run_to_end(engine)
    for name in "bc":
        engine.add(make_request(name, (*range(12), 60), sampling=make_sampling(max_tokens=1)))
    step(engine)
    assert runner.runs[-1] == [("b", 12, 1), ("c", 12, 1)]
    assert [each.block_ids[:3] for each in runner.slices[-2:]] == [(0, 1, 2), (0, 1, 2)]


def test_a_slice_has_blocks_for_its_positions_and_samples_only_at_the_last_known_token() -> None:
    engine, runner = make_recorded(max_batch_tokens=4)
    sampling = make_sampling(max_tokens=9)
    engine.add(make_request("a", range(6), sampling=sampling, first_token_index=3))
    step(engine)
    step(engine)
    first, second = runner.slices
    assert (first.block_ids, first.draw, first.token_ids) == ((0,), None, (0, 1, 2, 3))
    assert (second.block_ids, second.draw) == ((0, 1), Draw(sampling, 3))


class Books:
    """A scheduler with its pool, driven by hand."""

    def __init__(self, *, num_blocks: int = 16, limits: EngineLimits | None = None) -> None:
        self.pool = BlockPool(num_blocks)
        self.prefix = PrefixCache(self.pool)
        self.scheduler = Scheduler(self.pool, self.prefix, limits or make_limits(), clock=lambda: 0.0)
        self.runner = FakeRunner(block_size=BLOCK_SIZE)
        self.tokens: dict[SequenceId, list[SampledToken]] = {}

    def add(self, request: Request) -> Sequence:
        sequence = Sequence(request, make_hasher(), BlockLease(self.pool), 0.0)
        self.scheduler.enqueue(sequence)
        return sequence

    def plan(self) -> StepPlan:
        return self.scheduler.schedule(self.scheduler.snapshot(make_pacer(), num_granted=0))

    def commit(self, outcomes: list[SliceOutcome]) -> None:
        for sequence, outcome in self.scheduler.commit(outcomes):
            tokens = () if isinstance(outcome, StepFailedError) else outcome.tokens
            for choice, token in zip(sequence.choices, tokens, strict=bool(tokens)):
                self.tokens.setdefault(SequenceId(sequence.request_id, choice), []).append(token)
            if tokens and sequence.is_unforked:
                first_outputs(sequence, SliceResult(tokens), (), now=0.0)
                self.scheduler.remove(sequence)
                for each in fork(sequence):
                    self.scheduler.start(each)
            elif tokens and sequence.append(tokens[0], now=0.0) is not None:
                self.scheduler.remove(sequence)
                sequence.release_blocks()
                sequence.state = SequenceState.FINISHED


def test_scheduling_changes_nothing_and_gives_the_same_plan_again() -> None:
    books = Books(num_blocks=4)
    sequences = [books.add(make_request(name, range(start, start + 7))) for name, start in (("a", 0), ("b", 30))]
    books.commit([*books.runner.run(books.scheduler.apply(books.plan()))])
    for _ in range(3):
        before = (repr(sequences), books.pool.counts(), books.prefix.snapshot())
        plans = [books.plan() for _ in range(3)]
        assert plans[0] == plans[1] == plans[2]
        assert (repr(sequences), books.pool.counts(), books.prefix.snapshot()) == before
        books.commit([*books.runner.run(books.scheduler.apply(plans[0]))])


def test_what_a_plan_gave_a_victim_goes_to_others_in_the_same_plan() -> None:
    books = Books(num_blocks=7, limits=make_limits(max_batch_tokens=14))
    # Name, tokens known, tokens computed; one block each, and three left. By priority, so the last is the victim.
    for rank, (name, num_known, num_computed) in enumerate(
        (("long", 16, 4), ("more", 5, 2), ("stays", 5, 4), ("last", 5, 4))
    ):
        sequence = Sequence(
            make_request(name, range(20 * rank, 20 * rank + num_known), priority=-rank),
            make_hasher(),
            BlockLease(books.pool),
            0.0,
            num_computed_tokens=num_computed,
        )
        sequence.lease.extend(1)
        books.scheduler.start(sequence)
    plan = books.plan()
    # "last" had one token and one new block; its own block comes on top: three blocks for "long", one token for "more".
    assert plan.preempted == (("last", 0),)
    assert [(part.sequence_id.request_id, part.num_tokens, part.num_new_blocks) for part in plan.slices] == [
        ("stays", 1, 1),
        ("long", 12, 3),
        ("more", 1, 0),
    ]


def test_a_sequence_that_is_about_to_fork_is_nobodys_victim() -> None:
    books = Books(num_blocks=4)
    books.add(make_request("early", range(8), sampling=make_sampling(max_tokens=3)))
    books.add(make_request("late", range(20, 26), choices=(0, 1)))
    slices = books.scheduler.apply(books.plan())
    assert books.plan() == StepPlan()  # its blocks will be those of two forks when this plan is carried out
    books.commit([*books.runner.run(slices)])
    plan = books.plan()
    assert plan.preempted == (("late", 1), ("late", 0))
    assert [(part.sequence_id, part.num_new_blocks) for part in plan.slices] == [(("early", 0), 1)]


@pytest.mark.parametrize("num_blocks", [6, 7, 8, 16])
@pytest.mark.parametrize("max_batch_tokens", [6, 20])
def test_each_step_may_be_planned_while_the_one_before_runs(num_blocks: int, max_batch_tokens: int) -> None:
    books = Books(num_blocks=num_blocks, limits=make_limits(max_batch_tokens=max_batch_tokens))
    requests = [
        make_request("a", range(9), sampling=make_sampling(max_tokens=8)),
        make_request("b", range(30, 35), sampling=make_sampling(max_tokens=9, stop=frozenset(range(0, 64, 3)))),
        make_request("c", range(9), sampling=make_sampling(max_tokens=1)),
        make_request("d", range(20, 26), sampling=make_sampling(max_tokens=7), choices=(0, 1, 2), priority=1),
        make_request("e", range(40, 49), sampling=make_sampling(max_tokens=4), choices=(0, 3)),
    ]
    sequences = [books.add(request) for request in requests]
    plan = books.plan()
    for _ in range(200):
        slices = books.scheduler.apply(plan)
        plan = books.plan()  # the tokens being drawn are placeholders
        books.commit([*books.runner.run(slices)])
        books.pool.check_integrity()
        books.scheduler.check_integrity()
    assert [sequence.state for sequence in sequences] == [SequenceState.FINISHED] * 5
    assert books.tokens == {
        SequenceId(request.request_id, choice): list(expected_tokens(request, choice))
        for request in requests
        for choice in request.choices
    }
    assert books.pool.counts().held == 0


def test_a_sequence_whose_last_token_is_being_drawn_is_not_planned_again() -> None:
    books = Books()
    books.add(make_request("a", range(3), sampling=make_sampling(max_tokens=1)))
    books.add(make_request("p", range(3), kind=RequestKind.PREFILL))
    books.add(make_request("credit", range(3), credit=1))
    books.add(make_request("unforked", range(3), choices=(0, 1)))
    assert len(books.scheduler.apply(books.plan())) == 4
    assert books.plan() == StepPlan()


def test_a_rolled_back_step_is_planned_again_as_it_was() -> None:
    books = Books()
    books.add(make_request("a", range(6)))
    books.commit([*books.runner.run(books.scheduler.apply(books.plan()))])
    plan = books.plan()
    books.scheduler.apply(plan)
    books.scheduler.rollback()
    assert books.plan() == plan == StepPlan(slices=(PlannedSlice(SequenceId(RequestId("a"), 0), 6, 1, (), 0),))


def test_a_failed_slice_publishes_nothing() -> None:
    books = Books()
    sequence = books.add(make_request("a", range(8)))
    books.scheduler.apply(books.plan())
    books.commit([StepFailedError("x")])
    assert (sequence.num_computed_tokens, books.prefix.snapshot().stored) == (0, ())


def test_the_scheduler_refuses_what_only_a_defect_can_ask_for() -> None:
    books = Books()
    sequence = books.add(make_request("a", range(8)))
    with pytest.raises(IntegrityError, match="a/0 is queued already"):
        books.scheduler.enqueue(sequence)
    books.scheduler.apply(books.plan())
    with pytest.raises(IntegrityError, match="not committed"):
        books.scheduler.apply(StepPlan())
    books.commit([SliceResult()])
    for block_id in sequence.lease.table:
        if not books.pool.is_published(block_id):
            books.pool.publish(block_id)
    sequence.num_computed_tokens = 7
    with pytest.raises(IntegrityError, match="would write into the published block 1"):
        books.scheduler.apply(books.plan())


def test_limits_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="max_sequences is 0"):
        make_limits(max_sequences=0)
