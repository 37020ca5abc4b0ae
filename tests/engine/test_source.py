"""The life of an attempt to bring KV from elsewhere: in order, out of order, failed, given up."""

import pytest

from engine.cache.source import AttemptId, KVFirstTokens, KVLanded, KVQuiesced, KVReady
from engine.engine import Engine
from engine.fake import FakeRunner, FakeSource, expected_tokens
from engine.request import FinishReason, Request, RequestId, SampledToken
from engine.step import BlockCopy
from staffetta.errors import HandoffFailedError, InternalError
from tests.engine.making import (
    BLOCK_SIZE,
    RecordingRunner,
    make_engine_with_source,
    make_hasher,
    make_limits,
    make_prefill,
    make_request,
    make_sampling,
    reason,
    run_choices,
    run_to_end,
    step,
    step_choices,
    token_ids,
)

FIRST = AttemptId(1)
SECOND = AttemptId(2)


def wanted(request: Request) -> list[int]:
    return [token.token_id for token in expected_tokens(request)]


def begin(engine: Engine, request: Request) -> None:
    engine.add(request)
    step(engine)


def grant(engine: Engine, source: FakeSource, attempt_id: AttemptId = FIRST) -> None:
    source.ready(attempt_id)
    step(engine)
    assert source.attempts[attempt_id].block_ids is not None


def land(engine: Engine, source: FakeSource, num_tokens: int) -> None:
    source.land(FIRST, num_tokens)
    step(engine)


def assert_all_blocks_back(engine: Engine) -> None:
    counts = engine.counts()
    assert (counts.held_blocks, counts.quarantined_blocks) == (0, 0), counts


def test_a_hand_off_brings_kv_then_the_token_and_the_engine_goes_on_from_there() -> None:
    engine, runner, source = make_engine_with_source()
    request = make_request("a", range(10))
    begin(engine, request)
    assert source.lookups == [("a", 0, 10)]
    assert engine.counts().held_blocks == 0  # parked with nothing held
    source.ready(FIRST)
    step(engine)
    attempt = source.attempts[FIRST]
    assert attempt.block_ids == (0, 1, 2)
    assert list(attempt.chain_hashes) == make_hasher().chain(range(10))
    source.land(FIRST, 5)
    step(engine)
    assert len(engine.cache_snapshot().stored) == 1  # one full block of five tokens
    source.land(FIRST, 10)
    assert run_to_end(engine) == {}  # everything landed, and the token that the source promised is not drawn here
    assert runner.num_runs == 0
    source.send_first_tokens(FIRST)
    outputs = run_to_end(engine)["a"]
    assert [token.index for each in outputs for token in each.tokens] == [1, 2, 3, 4]
    assert token_ids(outputs) == wanted(request)[1:]
    stats = outputs[-1].stats
    assert stats is not None
    assert (stats.num_cached_tokens, stats.num_local_prompt_tokens, stats.num_recomputed_tokens) == (0, 0, 0)
    assert_all_blocks_back(engine)


@pytest.mark.parametrize("moment", ["begun", "ready", "granted", "part landed"])
def test_the_first_token_may_come_at_any_time_and_is_not_emitted_again(moment: str) -> None:
    engine, _, source = make_engine_with_source()
    request = make_request("a", range(10))
    begin(engine, request)
    for name, move in (
        ("begun", lambda: None),
        ("ready", lambda: source.ready(FIRST)),
        ("granted", lambda: step(engine)),
        ("part landed", lambda: source.land(FIRST, 6)),
    ):
        move()
        if name == moment:
            source.send_first_tokens(FIRST)
    step(engine)
    source.land(FIRST, 10)
    outputs = run_to_end(engine)["a"]
    assert token_ids(outputs) == wanted(request)[1:]


def test_a_first_token_that_ends_the_request_ends_it_at_once_and_its_blocks_wait_for_quiet() -> None:
    engine, _, source = make_engine_with_source()
    begin(engine, make_request("a", range(10), sampling=make_sampling(max_tokens=1)))
    grant(engine, source)
    source.land(FIRST, 4)
    source.send_first_tokens(FIRST)
    output = step(engine)["a"]
    assert (output.tokens, output.finish_reason) == ((), FinishReason.LENGTH)
    assert source.attempts[FIRST].is_over
    counts = engine.counts()
    assert (counts.held_blocks, counts.cached_blocks, counts.quarantined_blocks) == (0, 1, 2)
    source.quiesce(FIRST)
    step(engine)
    assert_all_blocks_back(engine)


def test_an_ending_and_a_failure_in_one_poll_give_one_ending() -> None:
    engine, _, source = make_engine_with_source()
    begin(engine, make_request("a", range(10), sampling=make_sampling(max_tokens=1)))
    source.send_first_tokens(FIRST)
    source.fail(FIRST, HandoffFailedError("too late"))
    assert step(engine)["a"].finish_reason is FinishReason.LENGTH
    assert engine.step() is None


def test_a_failure_keeps_what_landed_and_computes_the_rest_here() -> None:
    engine, _, source = make_engine_with_source(max_attempts=1)
    request = make_request("a", range(10))
    begin(engine, request)
    grant(engine, source)
    source.land(FIRST, 6)
    source.fail(FIRST)
    outputs = {"a": [step(engine)["a"]]}
    assert source.lookups == [("a", 0, 10), ("a", 4, 10)]
    assert engine.counts().quarantined_blocks == 2
    outputs["a"] += run_to_end(engine)["a"]
    assert token_ids(outputs["a"]) == wanted(request)
    stats = outputs["a"][-1].stats
    assert stats is not None and stats.num_local_prompt_tokens == 4
    assert engine.counts().quarantined_blocks == 2  # still, though the request is over
    source.quiesce(FIRST)
    step(engine)
    assert_all_blocks_back(engine)


def test_a_failure_without_a_prefix_cache_keeps_the_landed_blocks_too() -> None:
    engine, _, source = make_engine_with_source(max_attempts=1, limits=make_limits(prefix_caching=False))
    request = make_request("a", range(10))
    begin(engine, request)
    grant(engine, source)
    source.land(FIRST, 8)
    source.fail(FIRST)
    outputs = run_to_end(engine)["a"]
    assert token_ids(outputs) == wanted(request)
    stats = outputs[-1].stats
    assert stats is not None and stats.num_local_prompt_tokens == 2


def test_a_failure_after_the_first_token_tells_the_source_that_it_is_known() -> None:
    engine, _, source = make_engine_with_source()
    request = make_request("a", range(10))
    begin(engine, request)
    grant(engine, source)
    source.send_first_tokens(FIRST)
    source.land(FIRST, 8)
    source.fail(FIRST)
    step(engine)
    assert source.lookups[-1] == ("a", 8, 11)
    assert engine.counts().held_blocks == 0  # the second attempt waits with nothing held, too
    grant(engine, source, SECOND)
    assert len(source.attempts[SECOND].block_ids or ()) == 1
    source.land(SECOND, 10)
    source.send_first_tokens(SECOND)  # known: dropped
    assert token_ids(run_to_end(engine)["a"]) == wanted(request)[1:]


def test_a_failure_with_an_error_ends_the_request_with_it() -> None:
    engine, _, source = make_engine_with_source()
    begin(engine, make_request("a", range(10)))
    grant(engine, source)
    error = HandoffFailedError("recomputing is forbidden")
    source.fail(FIRST, error)
    output = step(engine)["a"]
    assert (output.finish_reason, output.error) == (FinishReason.ERROR, error)
    source.quiesce(FIRST)
    step(engine)
    assert_all_blocks_back(engine)


def test_a_failure_when_only_the_token_lacks_recomputes_the_last_block_into_a_new_one() -> None:
    engine, _, source = make_engine_with_source(max_attempts=1)
    request = make_request("a", range(8))
    begin(engine, request)
    grant(engine, source)
    source.land(FIRST, 8)
    step(engine)
    source.fail(FIRST)
    outputs = run_to_end(engine)["a"]
    assert source.lookups[-1] == ("a", 8, 8)
    assert token_ids(outputs) == wanted(request)
    stats = outputs[-1].stats
    assert stats is not None and stats.num_recomputed_tokens == 4
    assert_all_blocks_back(engine)


def test_quiet_that_comes_before_the_failure_frees_the_blocks_at_once() -> None:
    engine, _, source = make_engine_with_source(max_attempts=1)
    begin(engine, make_request("a", range(10)))
    grant(engine, source)
    source.quiesce(FIRST)
    source.fail(FIRST)
    step(engine)
    assert engine.counts().quarantined_blocks == 0


def test_kv_that_lands_in_full_after_the_request_is_gone_ends_the_quarantine() -> None:
    engine, _, source = make_engine_with_source()
    begin(engine, make_request("a", range(10)))
    grant(engine, source)
    source.land(FIRST, 10)  # in flight towards the engine
    engine.cancel(RequestId("a"))
    assert engine.counts().quarantined_blocks == 3
    assert step(engine)["a"].finish_reason is FinishReason.CANCELLED
    assert_all_blocks_back(engine)


@pytest.mark.parametrize("stage", ["new", "begun", "ready", "granted", "part landed", "landed"])
def test_a_cancel_at_any_stage_gives_every_block_back(stage: str) -> None:
    engine, _, source = make_engine_with_source(num_blocks=3)
    engine.add(make_request("a", range(10), sampling=make_sampling(max_tokens=2)))
    for name, move in (
        ("new", lambda: None),
        ("begun", lambda: step(engine)),
        ("ready", lambda: source._tell(KVReady(FIRST))),
        ("granted", lambda: step(engine)),
        ("part landed", lambda: land(engine, source, 5)),
        ("landed", lambda: land(engine, source, 10)),
    ):
        move()
        if name == stage:
            break
    engine.cancel(RequestId("a"))
    engine.cancel(RequestId("a"))
    engine.check_integrity()
    assert step(engine)["a"].finish_reason is FinishReason.CANCELLED
    assert engine.counts().quarantined_blocks == {"granted": 3, "part landed": 2}.get(stage, 0)
    if engine.counts().quarantined_blocks:
        source.quiesce(FIRST)
        step(engine)
    assert_all_blocks_back(engine)
    assert engine.step() is None


def test_a_full_prefix_hit_is_an_ordinary_hand_off_without_bytes() -> None:
    engine, _, source = make_engine_with_source()
    source.offering = {RequestId("b")}
    run_to_end_with(engine, make_request("a", range(8)))
    request = make_request("b", range(8))
    begin(engine, request)
    assert source.lookups[-1] == ("b", 8, 8)
    source.ready(FIRST)
    step(engine)
    assert source.attempts[FIRST].block_ids == ()
    source.land(FIRST, 8)
    source.send_first_tokens(FIRST)
    outputs = run_to_end(engine)["b"]
    assert token_ids(outputs) == wanted(request)[1:]
    stats = outputs[-1].stats
    assert stats is not None and stats.num_cached_tokens == 8


def run_to_end_with(engine: Engine, request: Request) -> None:
    engine.add(request)
    assert token_ids(run_to_end(engine)[request.request_id]) == wanted(request)


def test_a_prefix_that_shrank_starts_over_three_times_and_is_then_computed_here() -> None:
    engine, _, source = make_engine_with_source(num_blocks=6, max_attempts=99)
    source.offering = {RequestId("b")}
    request = make_request("b", range(16), sampling=make_sampling(max_tokens=1))
    run_to_end_with(engine, make_request("a", range(16), sampling=make_sampling(max_tokens=1)))
    begin(engine, request)
    # Each prefill takes one more block of the cached prefix, from its tail, and holds it.
    for attempt, num_taken in enumerate((3, 1, 1, 1), start=1):
        assert source.attempts[AttemptId(attempt)].num_cached_tokens == 20 - 4 * attempt
        engine.add(make_prefill(f"p{attempt}", range(100 * attempt, 100 * attempt + 4 * num_taken)))
        step(engine)
        source.ready(AttemptId(attempt))
        step(engine)
        assert source.attempts[AttemptId(attempt)].is_over
    assert len(source.attempts) == 4
    for attempt in range(1, 5):
        engine.release(RequestId(f"p{attempt}"))
    assert token_ids(run_to_end(engine)["b"]) == wanted(request)


def test_ready_sequences_get_blocks_in_order_and_nobody_overtakes() -> None:
    engine, _, source = make_engine_with_source(num_blocks=4)
    source.offering = {RequestId("big"), RequestId("small")}
    holder = make_request("holder", range(8), sampling=make_sampling(max_tokens=3))
    engine.add(holder)
    step(engine)
    engine.add(make_request("big", range(20, 36), sampling=make_sampling(max_tokens=1)))
    engine.add(make_request("small", range(40, 44), sampling=make_sampling(max_tokens=1)))
    step(engine)
    source.ready(SECOND)
    source.ready(FIRST)
    step(engine)  # the holder ends in this step; its blocks are there in the next
    assert [source.attempts[a].block_ids for a in (FIRST, SECOND)] == [None, None]
    step(engine)
    assert (len(source.attempts[FIRST].block_ids or ()), source.attempts[SECOND].block_ids) == (4, None)


def test_sequences_that_receive_kv_count_as_those_that_run() -> None:
    engine, runner, source = make_engine_with_source(limits=make_limits(max_sequences=1))
    source.offering = {RequestId("a"), RequestId("b")}
    for number, name in enumerate("abc"):
        engine.add(make_request(name, range(20 * number, 20 * number + 8)))
    step(engine)
    assert runner.num_runs == 1  # nobody receives yet, so the one that is computed here has the place
    engine.cancel(RequestId("c"))
    source.ready(FIRST)
    source.ready(SECOND)
    engine.add(make_request("d", range(60, 68)))
    run_to_end(engine)
    assert [source.attempts[a].block_ids is not None for a in (FIRST, SECOND)] == [True, False]
    assert runner.num_runs == 1


def test_a_preempted_sequence_is_recomputed_here_without_asking_again() -> None:
    engine, _, source = make_engine_with_source(num_blocks=5)
    first = make_request("first", range(8), sampling=make_sampling(max_tokens=8))
    second = make_request("second", range(20, 28), sampling=make_sampling(max_tokens=8))
    for request in (first, second):
        engine.add(request)
    step(engine)
    for attempt_id in (FIRST, SECOND):
        grant(engine, source, attempt_id)
    for attempt_id in (FIRST, SECOND):
        source.land(attempt_id, 8)
        source.send_first_tokens(attempt_id)
    outputs = run_to_end(engine)
    assert token_ids(outputs["first"]) == wanted(first)[1:]
    assert token_ids(outputs["second"]) == wanted(second)[1:]
    stats = outputs["second"][-1].stats
    assert stats is not None and stats.num_preemptions == 1
    assert len(source.lookups) == 2


def test_a_refused_lookup_ends_its_request_alone() -> None:
    engine, _, source = make_engine_with_source()
    refused = HandoffFailedError("nobody may compute this")
    source.refusing[RequestId("a")] = refused
    source.offering = set()
    engine.add(make_request("a"))
    engine.add(make_request("b"))
    outputs = run_to_end(engine)
    assert (reason(outputs["a"]), outputs["a"][0].error) == (FinishReason.ERROR, refused)
    assert reason(outputs["b"]) is FinishReason.LENGTH


def test_a_lookup_that_raises_something_else_ends_its_request_with_an_internal_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine, _, source = make_engine_with_source()

    def lookup(*_: object, **__: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(source, "lookup", lookup)
    engine.add(make_request("a"))
    error = step(engine)["a"].error
    assert isinstance(error, InternalError) and "secret" not in error.message
    assert "request a: looking for KV elsewhere raised" in caplog.text


@pytest.mark.parametrize(
    "event",
    [
        KVLanded(FIRST, 10, is_last=True),
        KVFirstTokens(FIRST, (SampledToken(3, 1),)),
    ],
)
def test_news_that_cannot_be_ends_its_request_and_nothing_else(event: KVLanded | KVFirstTokens) -> None:
    engine, _, source = make_engine_with_source()
    begin(engine, make_request("a", range(10)))
    source._tell(event)
    output = step(engine)["a"]
    assert (output.finish_reason, type(output.error)) == (FinishReason.ERROR, InternalError)
    assert source.attempts[FIRST].is_over
    assert_all_blocks_back(engine)


def test_kv_beyond_the_prompt_is_not_believed() -> None:
    engine, _, source = make_engine_with_source()
    begin(engine, make_request("a", range(10)))
    grant(engine, source)
    source._tell(KVLanded(FIRST, 11, is_last=False))
    assert step(engine)["a"].finish_reason is FinishReason.ERROR


def test_news_of_attempts_that_nobody_knows_is_dropped() -> None:
    engine, _, source = make_engine_with_source()
    unknown = AttemptId(99)
    for event in (KVReady(unknown), KVLanded(unknown, 4, is_last=False), KVQuiesced(unknown)):
        source._tell(event)
    assert step(engine) == {}
    assert engine.step() is None


def test_credit_counts_the_token_that_the_source_brought() -> None:
    engine, _, source = make_engine_with_source()
    request = make_request("a", range(10), credit=2)
    begin(engine, request)
    grant(engine, source)
    source.land(FIRST, 10)
    source.send_first_tokens(FIRST)
    assert token_ids(run_to_end(engine)["a"]) == wanted(request)[1:2]
    engine.grant(RequestId("a"), 0, 3)
    assert token_ids(run_to_end(engine)["a"]) == wanted(request)[2:]


def test_prefills_are_never_asked_about() -> None:
    engine, _, source = make_engine_with_source()
    engine.add(make_prefill("p", range(6)))
    run_to_end(engine)
    assert source.lookups == []


THREE = (0, 1, 2)


def make_three(*, stop_of: int | None = None, max_tokens: int = 5, credit: int | None = None) -> Request:
    """Three choices of a prompt of ten tokens; the first token of choice `stop_of` ends it."""
    free = make_request("a", range(10), choices=THREE)
    stop = frozenset() if stop_of is None else frozenset({expected_tokens(free, stop_of)[0].token_id})
    sampling = make_sampling(max_tokens=max_tokens, stop=stop)
    return make_request("a", range(10), choices=THREE, sampling=sampling, credit=credit)


def wanted_of(request: Request, choice: int) -> list[int]:
    return [token.token_id for token in expected_tokens(request, choice)]


def test_one_hand_off_brings_the_kv_of_all_choices_and_their_first_tokens() -> None:
    runner = RecordingRunner()
    engine, source = make_engine_and_source(runner)
    request = make_three()
    begin(engine, request)
    grant(engine, source)
    source.land(FIRST, 10)
    assert run_choices(engine) == {}  # the first tokens are not drawn here
    source.send_first_tokens(FIRST)
    outputs = run_choices(engine)
    for choice in THREE:
        assert token_ids(outputs["a", choice]) == wanted_of(request, choice)[1:]
    assert [each.copy for each in runner.slices[:3]] == [BlockCopy(2, 3), BlockCopy(2, 4), None]  # type: ignore[arg-type]
    assert len(source.attempts) == 1
    assert_all_blocks_back(engine)


def make_engine_and_source(
    runner: FakeRunner, *, max_attempts: int = 3, num_blocks: int = 32
) -> tuple[Engine, FakeSource]:
    source = FakeSource(runner, block_size=BLOCK_SIZE, max_attempts=max_attempts)
    limits = make_limits()
    return Engine(runner, num_blocks=num_blocks, hasher=make_hasher(), limits=limits, source=source), source


@pytest.mark.parametrize("moment", ["begun", "ready", "granted", "part landed"])
def test_choices_wait_together_for_their_kv_when_their_first_tokens_come_before_it(moment: str) -> None:
    engine, _, source = make_engine_with_source()
    request = make_three()
    begin(engine, request)
    for name, move in (
        ("begun", lambda: None),
        ("ready", lambda: source.ready(FIRST)),
        ("granted", lambda: step(engine)),
        ("part landed", lambda: source.land(FIRST, 6)),
    ):
        move()
        if name == moment:
            source.send_first_tokens(FIRST)
    step(engine)
    source.land(FIRST, 10)
    outputs = run_choices(engine)
    assert {key: token_ids(each) for key, each in outputs.items()} == {
        ("a", choice): wanted_of(request, choice)[1:] for choice in THREE
    }


def test_a_choice_that_its_first_token_ends_ends_at_once_and_the_others_go_on() -> None:
    engine, _, source = make_engine_with_source()
    request = make_three(stop_of=1)
    begin(engine, request)
    source.send_first_tokens(FIRST)
    outputs = step_choices(engine)
    assert {key: (each.tokens, each.finish_reason) for key, each in outputs.items()} == {
        ("a", 1): ((), FinishReason.STOP)
    }
    assert outputs["a", 1].stats is not None and not source.attempts[FIRST].is_over
    grant(engine, source)
    source.land(FIRST, 10)
    rest = run_choices(engine)
    assert {key: token_ids(each) for key, each in rest.items()} == {
        ("a", choice): wanted_of(request, choice)[1:] for choice in (0, 2)
    }
    assert_all_blocks_back(engine)


def test_when_first_tokens_end_all_choices_the_attempt_is_given_up() -> None:
    engine, _, source = make_engine_with_source()
    begin(engine, make_three(stop_of=2, max_tokens=1))
    grant(engine, source)
    source.send_first_tokens(FIRST)
    source.fail(FIRST, HandoffFailedError("too late"))
    outputs = step_choices(engine)
    assert [(key, each.finish_reason) for key, each in outputs.items()] == [
        (("a", 0), FinishReason.LENGTH),
        (("a", 1), FinishReason.LENGTH),
        (("a", 2), FinishReason.STOP),
    ]
    assert source.attempts[FIRST].is_over and not engine.has_work()
    assert engine.counts().quarantined_blocks == 3
    source.quiesce(FIRST)
    step(engine)
    assert_all_blocks_back(engine)


def test_an_error_ends_the_choices_that_their_first_tokens_did_not() -> None:
    engine, _, source = make_engine_with_source()
    begin(engine, make_three(stop_of=0))
    source.send_first_tokens(FIRST)
    source.fail(FIRST, HandoffFailedError("recomputing is forbidden"))
    outputs = step_choices(engine)
    assert {key: each.finish_reason for key, each in outputs.items()} == {
        ("a", 0): FinishReason.STOP,
        ("a", 1): FinishReason.ERROR,
        ("a", 2): FinishReason.ERROR,
    }
    assert not engine.has_work()


@pytest.mark.parametrize("num_landed", [0, 6])
def test_first_tokens_that_are_known_are_drawn_again_and_told_to_nobody(num_landed: int) -> None:
    runner = RecordingRunner()
    engine, source = make_engine_and_source(runner, max_attempts=1)
    request = make_three(stop_of=1, credit=0)
    begin(engine, request)
    grant(engine, source)
    source.send_first_tokens(FIRST)
    if num_landed:
        source.land(FIRST, num_landed)
    source.fail(FIRST)
    source.quiesce(FIRST)
    outputs = run_choices(engine)
    assert source.lookups[-1] == ("a", num_landed // 4 * 4, 11)
    assert [(key, token_ids(each)) for key, each in outputs.items()] == [(("a", 1), [])]
    draw = runner.slices[-1].draw
    assert draw is not None and (draw.output_index, draw.choices) == (0, THREE)
    for choice in THREE:
        engine.grant(RequestId("a"), choice, 10)
    rest = run_choices(engine)
    assert {key: token_ids(each) for key, each in rest.items()} == {
        ("a", choice): wanted_of(request, choice)[1:] for choice in (0, 2)
    }
    assert_all_blocks_back(engine)


def test_grants_before_the_fork_count_for_their_choice() -> None:
    engine, _, source = make_engine_with_source()
    request = make_three(credit=1)
    begin(engine, request)
    engine.grant(RequestId("a"), 2, 2)
    grant(engine, source)
    source.land(FIRST, 10)
    source.send_first_tokens(FIRST)
    outputs = run_choices(engine)
    assert {key: token_ids(each) for key, each in outputs.items()} == {("a", 2): wanted_of(request, 2)[1:3]}


@pytest.mark.parametrize(
    "tokens",
    [
        (),
        (SampledToken(0, 1), SampledToken(0, 2)),
        (SampledToken(0, 1), SampledToken(0, 2), SampledToken(1, 3)),
        (SampledToken(0, 1),) * 4,
    ],
    ids=["none", "one lacks", "another position", "one too many"],
)
def test_first_tokens_that_do_not_fit_the_choices_end_the_request(tokens: tuple[SampledToken, ...]) -> None:
    engine, _, source = make_engine_with_source()
    begin(engine, make_three())
    source._tell(KVFirstTokens(FIRST, tokens))
    outputs = step_choices(engine)
    assert {key: type(each.error) for key, each in outputs.items()} == {
        ("a", choice): InternalError for choice in THREE
    }
    assert source.attempts[FIRST].is_over
    assert_all_blocks_back(engine)


@pytest.mark.parametrize("stage", ["new", "begun", "ready", "granted", "part landed", "tokens", "forked"])
def test_a_cancel_of_three_choices_at_any_stage_gives_three_endings_and_every_block_back(stage: str) -> None:
    engine, _, source = make_engine_with_source(num_blocks=5)
    engine.add(make_three())
    for name, move in (
        ("new", lambda: None),
        ("begun", lambda: step(engine)),
        ("ready", lambda: source._tell(KVReady(FIRST))),
        ("granted", lambda: step(engine)),
        ("part landed", lambda: land(engine, source, 5)),
        ("tokens", lambda: source.send_first_tokens(FIRST)),
        ("forked", lambda: source.land(FIRST, 10)),
    ):
        move()
        if name == stage:
            break
    if stage in ("tokens", "forked"):
        engine.step()
    engine.cancel(RequestId("a"))
    engine.cancel(RequestId("a"))
    engine.check_integrity()
    outputs = step_choices(engine)
    assert {key: each.finish_reason for key, each in outputs.items()} == {
        ("a", choice): FinishReason.CANCELLED for choice in THREE
    }
    if engine.counts().quarantined_blocks:
        source.quiesce(FIRST)
        step(engine)
    assert_all_blocks_back(engine)
    assert engine.step() is None
