"""Steps begun ahead that fail, cannot be begun, or are given up: others go on, and nothing is left in flight."""

import pytest

from engine.cache.lease import BlockLease
from engine.cache.pool import IntegrityError
from engine.request import FinishReason, RequestId
from engine.scheduler import Scheduler, SliceOutcome
from engine.step import Following, SequenceSlice, StepInFlight
from staffetta import failpoint
from tests.engine.making import (
    BLOCK_SIZE,
    reason,
    run_to_end,
    step,
    token_ids,
)
from tests.engine.test_ahead import expected_ids, make_engine, make_stream


def test_a_slice_that_fails_ahead_ends_its_own_request_alone() -> None:
    engine, runner = make_engine()
    other = make_stream("b")
    engine.add(make_stream("a"))
    engine.add(other)
    first = [step(engine), step(engine)]
    runner.is_prompt = lambda: False
    runner.failing.add(RequestId("a"))
    rest = run_to_end(engine)
    assert reason(rest["a"]) is FinishReason.ERROR
    assert len(token_ids(rest["a"])) == 1  # of the step that was computed by then
    assert token_ids([outputs["b"] for outputs in first] + rest["b"]) == expected_ids(other)
    assert engine.counts().held_blocks == 0


@pytest.mark.parametrize("is_over", [True, False], ids=["of one that is over", "of one that goes on"])
def test_a_token_that_cannot_be_drawn_has_the_step_run_again_for_those_who_go_on(is_over: bool) -> None:
    engine, runner = make_engine()
    other = make_stream("b")
    engine.add(make_stream("a"))
    engine.add(other)
    runner.is_prompt = lambda: False
    first = [step(engine), step(engine)]
    runner.undrawable.add(RequestId("a"))
    if is_over:
        engine.cancel(RequestId("a"))
    num_runs = runner.num_runs
    first.append(step(engine))
    assert runner.num_runs == num_runs + (1 if is_over else 2)
    runner.undrawable.clear()
    rest = run_to_end(engine)
    assert token_ids([outputs["b"] for outputs in first] + rest["b"]) == expected_ids(other)


@pytest.mark.parametrize("is_first", [True, False], ids=["the first", "one that follows"])
def test_a_step_that_cannot_be_begun_is_run(is_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, runner = make_engine()
    begin = runner.begin

    def refuse(slices: tuple[SequenceSlice, ...], *, follows: Following | None = None) -> StepInFlight | None:
        if is_first == (follows is None):
            raise ValueError("a slice without tokens")
        return begin(slices, follows=follows)

    monkeypatch.setattr(runner, "begin", refuse)
    request = make_stream("a")
    engine.add(request)
    assert token_ids(run_to_end(engine)["a"]) == expected_ids(request)
    assert not runner.in_flight and runner.num_ahead == 0


def test_a_turn_that_is_broken_off_leaves_nothing_in_flight_and_is_made_up_for() -> None:
    engine, runner = make_engine()
    request = make_stream("a")
    engine.add(request)
    first = [step(engine), step(engine)]
    failpoint.arm(("engine.step:raise:1",))
    try:
        with pytest.raises(failpoint.FailpointError):
            engine.step()
    finally:
        failpoint.arm(())
    engine.check_integrity()
    assert not runner.in_flight
    assert token_ids([outputs["a"] for outputs in first] + run_to_end(engine)["a"]) == expected_ids(request)


@pytest.mark.parametrize("when", ["while it is begun", "at the commit"])
def test_a_contradiction_in_the_books_ends_the_turn_with_nothing_in_flight(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, runner = make_engine()
    engine.add(make_stream("a"))
    step(engine), step(engine)

    errors = [IntegrityError("two owners of a block")]

    def contradict(_: object, what: int | list[SliceOutcome]) -> None:
        if what and errors:  # a lease is extended by no block, too
            raise errors.pop()

    if when == "at the commit":
        monkeypatch.setattr(Scheduler, "commit", contradict)
    else:
        monkeypatch.setattr(BlockLease, "extend", contradict)
    with pytest.raises(IntegrityError, match="two owners of a block"):
        for _ in range(BLOCK_SIZE):  # one of these steps needs a block
            engine.step()
    assert not runner.in_flight


def test_closing_leaves_nothing_in_flight() -> None:
    engine, runner = make_engine()
    engine.add(make_stream("a"))
    step(engine), step(engine)
    engine.close()
    assert not runner.in_flight
