"""Steps begun ahead: when there is one, what commands and endings do to it, and that tokens are as without any."""

import pytest

from engine.engine import Engine
from engine.fake import expected_tokens
from engine.request import FinishReason, Request, RequestId
from tests.engine.background import BackgroundFakeRunner
from tests.engine.making import (
    BLOCK_SIZE,
    make_hasher,
    make_limits,
    make_prefill,
    make_request,
    make_sampling,
    reason,
    run_to_end,
    step,
    token_ids,
)


def make_engine(
    *, num_blocks: int = 32, max_sequences: int = 8, max_batch_tokens: int = 64
) -> tuple[Engine, BackgroundFakeRunner]:
    runner = BackgroundFakeRunner(block_size=BLOCK_SIZE)
    limits = make_limits(max_sequences=max_sequences, max_batch_tokens=max_batch_tokens)
    return Engine(runner, num_blocks=num_blocks, hasher=make_hasher(), limits=limits), runner


def make_stream(name: str, *, max_tokens: int = 9, credit: int | None = None) -> Request:
    return make_request(name, sampling=make_sampling(max_tokens=max_tokens), credit=credit)


def expected_ids(request: Request) -> list[int]:
    return [token.token_id for token in expected_tokens(request)]


def test_streams_get_their_tokens_and_every_step_but_the_first_two_is_begun_ahead() -> None:
    engine, runner = make_engine()
    requests = [make_stream("a"), make_stream("b", max_tokens=5)]
    for request in requests:
        engine.add(request)
    outputs = run_to_end(engine)
    assert [token_ids(outputs[each.request_id]) for each in requests] == [expected_ids(each) for each in requests]
    # The prompts' step draws the first of nine tokens, the second follows none.
    assert runner.num_ahead == 7 and runner.num_runs == 9
    assert not runner.in_flight and engine.counts().held_blocks == 0


def test_a_length_is_known_ahead_and_nothing_is_computed_in_vain() -> None:
    engine, runner = make_engine()
    engine.add(make_stream("a", max_tokens=4))
    run_to_end(engine)
    assert runner.num_runs == 4


def test_credit_is_counted_ahead() -> None:
    engine, runner = make_engine()
    request = make_stream("a", credit=4)
    engine.add(request)
    outputs = run_to_end(engine)
    assert token_ids(outputs["a"]) == expected_ids(request)[:4] and runner.num_runs == 4
    engine.grant(RequestId("a"), 0, 10)
    assert token_ids(run_to_end(engine)["a"]) == expected_ids(request)[4:]


@pytest.mark.parametrize("is_prompt", [True, False], ids=["written at once", "written late"])
def test_a_stop_token_ends_a_stream_that_is_being_computed_further(is_prompt: bool) -> None:
    engine, runner = make_engine(num_blocks=6)
    runner.is_prompt = lambda: is_prompt
    prompt, longer = range(2, 9), make_stream("b", max_tokens=12)
    first = expected_ids(make_request("x", prompt))
    assert first[3] not in first[:3]
    engine.add(make_request("a", prompt, sampling=make_sampling(max_tokens=9, stop=frozenset(first[3:4]))))
    engine.add(longer)
    outputs = run_to_end(engine)
    assert reason(outputs["a"]) is FinishReason.STOP and token_ids(outputs["a"]) == first[:4]
    assert token_ids(outputs["b"]) == expected_ids(longer)
    assert engine.counts().held_blocks == 0


def test_a_step_for_nobody_is_discarded_before_the_engine_sleeps() -> None:
    engine, runner = make_engine()
    engine.add(make_stream("a"))
    step(engine), step(engine)
    assert len(runner.in_flight) == 1
    engine.cancel(RequestId("a"))
    engine.check_integrity()
    assert step(engine)["a"].finish_reason is FinishReason.CANCELLED
    assert not runner.in_flight and engine.step() is None and engine.counts().held_blocks == 0


def test_a_step_for_nobody_is_discarded_in_the_turn_in_which_the_last_stream_ends() -> None:
    engine, runner = make_engine()
    stop = expected_ids(make_stream("a"))[2]
    engine.add(make_request("a", sampling=make_sampling(max_tokens=9, stop=frozenset([stop]))))
    while engine.has_work():
        engine.step()
    assert runner.num_ahead == 2 and not runner.in_flight


def test_a_cancelled_streams_slice_is_thrown_away_and_the_others_go_on() -> None:
    engine, runner = make_engine()
    other = make_stream("b")
    engine.add(make_stream("a"))
    engine.add(other)
    first = [step(engine), step(engine)]
    engine.cancel(RequestId("a"))
    rest = run_to_end(engine)
    assert [each.finish_reason for each in rest["a"]] == [FinishReason.CANCELLED]
    assert token_ids([outputs["b"] for outputs in first] + rest["b"]) == expected_ids(other)
    assert runner.num_ahead == 7


@pytest.mark.parametrize("is_late", [True, False], ids=["the driver comes late", "the driver comes early"])
def test_a_request_that_comes_with_a_hold_joins_the_very_next_step(is_late: bool) -> None:
    engine, runner = make_engine()
    runner.is_prompt = lambda: False  # the driver has not come to the next step when the news arrives
    engine.add(make_stream("a"))
    step(engine)
    step(engine)
    engine.hold()
    if not is_late:
        runner.in_flight[0].compute()
    engine.go_on()
    engine.add(make_stream("b"))
    assert set(step(engine)) == {"a", "b"}


def test_a_request_that_comes_while_the_next_step_is_under_way_joins_the_one_after() -> None:
    engine, _ = make_engine()
    requests = [make_stream("a"), make_stream("b")]
    engine.add(requests[0])
    step(engine)
    step(engine)
    engine.add(requests[1])
    assert set(step(engine)) == {"a"}
    assert set(step(engine)) == {"a", "b"}


def test_no_step_is_begun_ahead_while_somebody_waits_who_could_join() -> None:
    engine, runner = make_engine(max_sequences=2, num_blocks=5)
    engine.add(make_stream("a"))
    engine.add(make_request("b", range(20, 33)))  # there is a place, and no room
    for _ in range(5):
        assert set(step(engine)) == {"a"}
    assert runner.num_ahead == 0


def test_with_all_places_taken_steps_are_begun_ahead_until_one_gets_free_and_whoever_waits_joins_at_once() -> None:
    engine, runner = make_engine(max_sequences=2)
    requests = [make_stream("a"), make_stream("b", max_tokens=6), make_stream("c")]
    for request in requests:
        engine.add(request)
    seen = [step(engine) for _ in range(7)]
    assert [set(outputs) for outputs in seen] == [{"a", "b"}] * 6 + [{"a", "c"}]
    assert runner.num_ahead == 4  # of tokens 3 to 6: b's last is known to be that
    rest = run_to_end(engine)
    for request in requests:
        name = request.request_id
        told = [outputs[name] for outputs in seen if name in outputs] + rest.get(name, [])
        assert token_ids(told) == expected_ids(request)


def test_the_place_of_a_stream_that_stops_is_taken_one_step_later() -> None:
    engine, _ = make_engine(max_sequences=2)
    prompt = range(2, 9)
    first = expected_ids(make_request("x", prompt))
    assert first[3] not in first[:3]
    engine.add(make_stream("a"))
    engine.add(make_request("b", prompt, sampling=make_sampling(max_tokens=9, stop=frozenset(first[3:4]))))
    engine.add(make_stream("c"))
    seen = [set(step(engine)) for _ in range(6)]
    assert seen == [{"a", "b"}] * 4 + [{"a"}, {"a", "c"}]


def test_a_request_that_waits_for_its_first_grant_keeps_no_step_from_being_begun_ahead() -> None:
    engine, runner = make_engine()
    paused = make_stream("p", credit=0)
    engine.add(paused)
    engine.add(make_stream("a"))
    run_to_end(engine)
    assert runner.num_ahead == 7 and engine.counts().num_waiting == 1
    engine.grant(RequestId("p"), 0, 9)
    assert token_ids(run_to_end(engine)["p"]) == expected_ids(paused)


def test_no_step_is_begun_ahead_while_the_applied_one_leaves_somebody_out() -> None:
    engine, runner = make_engine(max_batch_tokens=1)
    engine.add(make_request("a", (5,), sampling=make_sampling(max_tokens=9), credit=2))
    step(engine), step(engine)
    engine.add(make_request("b", (6,), sampling=make_sampling(max_tokens=9)))
    step(engine), step(engine)
    engine.grant(RequestId("a"), 0, 10)
    step(engine)  # of b, begun before the grant
    num_ahead = runner.num_ahead
    for _ in range(4):
        assert set(step(engine)) == {"a"}
    assert runner.num_ahead == num_ahead


def test_a_prompt_of_one_token_for_several_choices_is_not_begun() -> None:
    engine, _ = make_engine()
    stream = make_stream("a")
    engine.add(stream)
    step(engine), step(engine)
    engine.add(make_request("b", (5,), choices=(0, 1)))
    assert token_ids(run_to_end(engine)["a"]) == expected_ids(stream)[2:]  # and the runner found nothing to complain of


def test_no_step_is_begun_ahead_that_would_have_to_take_blocks_from_somebody(caplog: pytest.LogCaptureFixture) -> None:
    engine, _ = make_engine(num_blocks=5)
    requests = [make_stream("a", max_tokens=8), make_stream("b", max_tokens=8)]
    for request in requests:
        engine.add(request)
    outputs = run_to_end(engine)
    assert [token_ids(outputs[each.request_id]) for each in requests] == [expected_ids(each) for each in requests]
    assert any(each.stats is not None and each.stats.num_preemptions for each in outputs["b"])
    assert not caplog.records


@pytest.mark.parametrize(
    "request_",
    [
        make_request("a", sampling=make_sampling(presence_penalty=0.5)),
        make_request("a", sampling=make_sampling(num_logprobs=0)),
    ],
    ids=["penalties", "log-probabilities"],
)
def test_no_step_is_begun_ahead_for_what_needs_more_than_the_token(request_: Request) -> None:
    engine, runner = make_engine()
    engine.add(request_)
    engine.add(make_stream("b"))
    outputs = run_to_end(engine)
    assert token_ids(outputs["a"]) == expected_ids(request_)
    assert runner.num_ahead == 3  # of the other, once it is alone


def test_a_prefill_ends_its_part_and_the_stream_beside_it_goes_on() -> None:
    engine, runner = make_engine()
    stream = make_stream("a")
    engine.add(stream)
    engine.add(make_prefill("p", range(1)))
    outputs = run_to_end(engine)
    assert token_ids(outputs["a"]) == expected_ids(stream) and len(token_ids(outputs["p"])) == 1
    engine.release(RequestId("p"))
    assert engine.counts().held_blocks == 0 and runner.num_ahead == 7
