"""Cancelling one choice of a request: it ends at once and gives its blocks back; the others never notice."""

import pytest

from engine.cache.source import AttemptId
from engine.engine import Engine
from engine.fake import expected_tokens
from engine.request import FinishReason, Request, RequestId, SequenceOutput
from tests.engine.making import (
    make_engine,
    make_engine_with_source,
    make_limits,
    make_prefill,
    make_request,
    make_sampling,
    reason,
    run_choices,
    step_choices,
    token_ids,
)

A = RequestId("a")
FIRST = AttemptId(1)
THREE = (0, 1, 2)
CANCELLED, LENGTH = FinishReason.CANCELLED, FinishReason.LENGTH

Outputs = dict[tuple[str, int], list[SequenceOutput]]


def wanted(request: Request, choice: int) -> list[int]:
    return [token.token_id for token in expected_tokens(request, choice)]


def assert_others_are_whole(engine: Engine, request: Request, outputs: Outputs, *, cancelled: int) -> None:
    for choice in set(request.choices) - {cancelled}:
        assert token_ids(outputs["a", choice]) == wanted(request, choice)
        assert reason(outputs["a", choice]) is LENGTH
    assert (engine.counts().held_blocks, engine.has_work()) == (0, False)


@pytest.mark.parametrize("choice", THREE)
def test_a_cancelled_choice_ends_alone_and_its_blocks_are_free_at_once(choice: int) -> None:
    engine, _ = make_engine(limits=make_limits(max_requests=3))
    request = make_request("a", range(6), choices=THREE)
    engine.add(request)
    outputs = {key: [output] for key, output in step_choices(engine).items()}
    for key, output in step_choices(engine).items():
        outputs[key].append(output)
    assert engine.counts().held_blocks == 4
    engine.cancel(A, choice)
    engine.cancel(A, choice)
    assert engine.counts().held_blocks == 3
    engine.add(make_request("b"))  # its place is free as well
    for key, later in run_choices(engine).items():
        outputs.setdefault(key, []).extend(later)
    assert token_ids(outputs["a", choice]) == wanted(request, choice)[:2]
    assert [output.finish_reason for output in outputs["a", choice]] == [None, None, CANCELLED]
    assert_others_are_whole(engine, request, outputs, cancelled=choice)


@pytest.mark.parametrize("choice", THREE)
def test_a_choice_that_is_cancelled_before_the_first_tokens_never_has_any(choice: int) -> None:
    engine, _ = make_engine(limits=make_limits(max_batch_tokens=4))
    request = make_request("a", range(10), choices=THREE, sampling=make_sampling(num_prompt_logprobs=0))
    engine.add(request)
    first = step_choices(engine)
    engine.cancel(A, choice)
    outputs = run_choices(engine)
    assert [(output.tokens, output.finish_reason) for output in outputs["a", choice]] == [((), CANCELLED)]
    assert_others_are_whole(engine, request, outputs, cancelled=choice)
    # What was scored after it comes with a choice that is there to take it.
    scored = [output.prompt_tokens for key, each in outputs.items() if key[1] != choice for output in each]
    assert [token.position for output in first.values() for token in output.prompt_tokens] == [1, 2, 3, 4]
    assert [token.position for tokens in scored for token in tokens] == [5, 6, 7, 8, 9]


def test_nobody_waits_for_the_credit_of_a_cancelled_choice() -> None:
    engine, _ = make_engine()
    request = make_request("a", range(6), choices=THREE, credit=0)
    engine.add(request)
    for choice in (0, 2):
        engine.grant(A, choice, 5)
    assert run_choices(engine) == {}
    engine.cancel(A, 1)
    assert_others_are_whole(engine, request, run_choices(engine), cancelled=1)


@pytest.mark.parametrize("num_landed", [0, 5])
def test_a_choice_that_is_cancelled_while_its_kv_is_on_the_way_is_not_forked(num_landed: int) -> None:
    engine, runner, source = make_engine_with_source()
    request = make_request("a", range(10), choices=THREE)
    engine.add(request)
    step_choices(engine)
    source.ready(FIRST)
    step_choices(engine)
    if num_landed:
        source.land(FIRST, num_landed)
        step_choices(engine)
    engine.cancel(A, 1)
    source.land(FIRST, 10)
    source.send_first_tokens(FIRST)
    outputs = run_choices(engine)
    assert [(output.tokens, output.finish_reason) for output in outputs["a", 1]] == [((), CANCELLED)]
    for choice in (0, 2):
        assert token_ids(outputs["a", choice]) == wanted(request, choice)[1:]
    assert (engine.counts().held_blocks, runner.num_runs) == (0, 4)


def test_a_first_token_that_would_have_ended_a_cancelled_choice_ends_it_no_second_time() -> None:
    engine, _, source = make_engine_with_source()
    stop = frozenset({wanted(make_request("a", range(10), choices=THREE), 1)[0]})
    request = make_request("a", range(10), choices=THREE, sampling=make_sampling(stop=stop))
    engine.add(request)
    step_choices(engine)
    engine.cancel(A, 1)
    source.send_first_tokens(FIRST)
    outputs = step_choices(engine)
    assert {key: output.finish_reason for key, output in outputs.items()} == {("a", 1): CANCELLED}


def test_a_request_is_over_when_each_of_its_choices_was_cancelled() -> None:
    engine, _, source = make_engine_with_source()
    engine.add(make_request("a", range(10), choices=THREE))
    step_choices(engine)
    for choice in THREE:
        engine.cancel(A, choice)
    assert {key: reason(outputs) for key, outputs in run_choices(engine).items()} == {
        ("a", choice): CANCELLED for choice in THREE
    }
    assert source.attempts[FIRST].is_over and not engine.has_work()


def test_a_choice_that_there_is_not_or_that_is_a_prefills_cannot_be_cancelled() -> None:
    engine, _ = make_engine()
    engine.add(make_request("a", range(6), choices=(0,)))
    engine.cancel(A, 1)
    engine.cancel(RequestId("nobody"), 0)
    assert reason(run_choices(engine)["a", 0]) is LENGTH
    engine.add(make_prefill("p", range(6)))
    engine.cancel(RequestId("p"), 0)
    (output,) = run_choices(engine)["p", 0]
    assert len(output.tokens) == 1 and engine.counts().num_held == 1
