"""The engine as its services see it: what is refused, what comes out, what is freed, who fails."""

import subprocess
import sys

import pytest

from engine.engine import Engine, EngineCounts
from engine.fake import FakeRunner, expected_tokens
from engine.request import (
    FinalBlock,
    FinishReason,
    Request,
    RequestId,
    RequestKind,
    SampledToken,
    SequenceOutput,
)
from engine.step import SequenceSlice, SliceResult
from staffetta.errors import ContextLengthExceededError, InvalidRequestError, QueueFullError, StepFailedError
from staffetta.hashing import short_hash
from tests.engine.making import (
    BLOCK_SIZE,
    RecordingRunner,
    make_engine,
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


def wanted(request: Request) -> list[int]:
    return [token.token_id for token in expected_tokens(request)]


def test_a_request_runs_to_its_last_token_and_gives_its_blocks_back() -> None:
    engine, _ = make_engine()
    request = make_request("a", sampling=make_sampling(max_tokens=4, num_logprobs=0))
    engine.add(request)
    outputs = run_to_end(engine)["a"]
    assert [token for each in outputs for token in each.tokens] == list(expected_tokens(request))
    assert [each.finish_reason for each in outputs] == [None, None, None, FinishReason.LENGTH]
    assert engine.counts().held_blocks == 0 and not engine.has_work()


def test_the_stop_token_is_emitted_with_the_ending() -> None:
    engine, _ = make_engine()
    free = wanted(make_request("a", sampling=make_sampling(max_tokens=8)))
    stop = frozenset({free[1]})
    engine.add(make_request("a", sampling=make_sampling(max_tokens=8, stop=stop)))
    outputs = run_to_end(engine)["a"]
    assert token_ids(outputs) == free[:2] and reason(outputs) is FinishReason.STOP


class DeafRunner(FakeRunner):
    """Draws token 1 always, masked or not."""

    def run(self, slices: tuple[SequenceSlice, ...]) -> list[SliceResult]:
        return [SliceResult((SampledToken(each.draw.output_index, 1),) if each.draw else ()) for each in slices]


def test_a_stop_token_before_min_tokens_does_not_stop() -> None:
    engine, _ = make_engine(runner=DeafRunner(block_size=BLOCK_SIZE))
    engine.add(make_request("a", sampling=make_sampling(max_tokens=8, min_tokens=3, stop=frozenset({1}))))
    outputs = run_to_end(engine)["a"]
    assert (len(token_ids(outputs)), reason(outputs)) == (4, FinishReason.STOP)


def test_output_positions_go_on_after_a_restart() -> None:
    engine, _ = make_engine()
    whole = make_request("a", range(6), sampling=make_sampling(max_tokens=7))
    head = tuple(wanted(whole)[:3])
    engine.add(make_request("a", (*range(6), *head), sampling=whole.sampling, first_token_index=3))
    outputs = run_to_end(engine)["a"]
    assert [token.index for each in outputs for token in each.tokens] == [3, 4, 5, 6]
    assert [*head, *token_ids(outputs)] == wanted(whole)


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (make_request("x", ()), InvalidRequestError, "prompt is empty"),
        (make_request("x", (1, -1)), InvalidRequestError, "token ids go from 0"),
        (make_request("x", (1, 2**32)), InvalidRequestError, "token ids go from 0"),
        (make_request("x", sampling=make_sampling(max_tokens=0)), InvalidRequestError, "max_tokens is 0"),
        (make_request("x", sampling=make_sampling(min_tokens=-1)), InvalidRequestError, "min_tokens is -1"),
        (make_request("x", first_token_index=7), InvalidRequestError, "first_token_index is 7 for a prompt of 6"),
        (make_request("x", first_token_index=-1), InvalidRequestError, "first_token_index is -1"),
        (make_request("x", first_token_index=5), InvalidRequestError, "nothing is left to do"),
        (make_request("x", credit=-1), InvalidRequestError, "credit is -1"),
        (make_request("x", range(96)), ContextLengthExceededError, "maximum context length is 100 tokens.* by 1$"),
        (make_request("x", range(38)), ContextLengthExceededError, "needs 11 KV blocks of 4 tokens .* has 10"),
        (make_prefill("x", range(41)), ContextLengthExceededError, "needs 11 KV blocks of 4 tokens .* has 10"),
    ],
)
def test_what_can_never_be_served_is_refused_and_leaves_nothing(
    request_: Request, error: type[Exception], message: str
) -> None:
    engine, _ = make_engine(num_blocks=10, limits=make_limits(max_model_len=100))
    with pytest.raises(error, match=message):
        engine.add(request_)
    assert not engine.has_work() and engine.step() is None


@pytest.mark.parametrize("request_", [make_request("x", range(36)), make_prefill("x", range(40))])
def test_a_request_that_just_fits_the_pool_is_served(request_: Request) -> None:
    engine, _ = make_engine(num_blocks=10, limits=make_limits(max_model_len=100))
    engine.add(request_)
    assert token_ids(run_to_end(engine)["x"]) == wanted(request_)[: 1 if request_.kind is RequestKind.PREFILL else 5]


def test_an_id_under_way_is_refused_and_free_again_after_the_end() -> None:
    engine, _ = make_engine()
    engine.add(make_request("a"))
    with pytest.raises(InvalidRequestError, match="id is under way"):
        engine.add(make_request("a"))
    run_to_end(engine)
    engine.add(make_request("a"))
    assert reason(run_to_end(engine)["a"]) is FinishReason.LENGTH


def test_beyond_max_requests_a_typed_retryable_refusal() -> None:
    engine, _ = make_engine(limits=make_limits(max_requests=2))
    engine.add(make_prefill("held", range(4)))
    run_to_end(engine)
    engine.add(make_request("a"))
    with pytest.raises(QueueFullError) as refusal:
        engine.add(make_request("b"))
    assert refusal.value.is_retryable
    engine.release(RequestId("held"))
    engine.add(make_request("b"))


def test_a_prefill_takes_one_place_whatever_its_choices() -> None:
    engine, _ = make_engine(limits=make_limits(max_requests=2))
    for name in ("a", "b"):
        engine.add(make_prefill(name, range(4), choices=(0, 1, 2)))
    with pytest.raises(QueueFullError, match="holds 2 requests, a choice counted as one, and may hold 2"):
        engine.add(make_prefill("c", range(4)))
    assert [len(output.tokens) for outputs in run_to_end(engine).values() for output in outputs] == [3, 3]
    engine.release(RequestId("a"))
    engine.add(make_prefill("c", range(4), choices=(0, 1, 2)))


def test_a_prefill_reports_each_block_once_then_its_token_and_is_held() -> None:
    engine, _ = make_engine(limits=make_limits(max_batch_tokens=8))
    request = make_prefill("p", range(18))
    chain = make_hasher().chain(range(18))
    engine.add(request)
    outputs = run_to_end(engine)["p"]
    assert [each.final_blocks for each in outputs] == [
        tuple(FinalBlock(i, i, 4, 1, chain[i]) for i in (0, 1)),  # type: ignore[arg-type]
        tuple(FinalBlock(i, i, 4, 1, chain[i]) for i in (2, 3)),  # type: ignore[arg-type]
        (FinalBlock(4, 4, 2, 1, None),),  # type: ignore[arg-type]
    ]
    assert [each.tokens for each in outputs] == [(), (), expected_tokens(request)[:1]]
    assert outputs[-1].finish_reason is None and outputs[-1].stats is not None
    assert (engine.counts().num_held, engine.counts().held_blocks, engine.has_work()) == (1, 5, False)
    engine.release(RequestId("p"))
    engine.release(RequestId("p"))
    assert (engine.counts().num_held, engine.counts().held_blocks, engine.counts().cached_blocks) == (0, 0, 4)
    assert engine.step() is None


def test_blocks_from_the_prefix_cache_are_in_the_first_output_of_a_prefill() -> None:
    engine, _ = make_engine(limits=make_limits(max_batch_tokens=8))
    engine.add(make_request("a", range(8), sampling=make_sampling(max_tokens=1)))
    run_to_end(engine)
    engine.add(make_prefill("p", range(20)))
    outputs = run_to_end(engine)["p"]
    assert [[b.block_index for b in each.final_blocks] for each in outputs] == [[0, 1, 2, 3], [4]]
    assert outputs[-1].stats is not None and outputs[-1].stats.num_cached_tokens == 8


def test_a_prompt_that_hits_in_full_recomputes_its_last_block_into_a_new_one() -> None:
    runner = RecordingRunner()
    engine, _ = make_engine(runner=runner)
    for name in "ab":
        engine.add(make_prefill(name, range(8)))
        outputs = run_to_end(engine)[name]
        assert token_ids(outputs) == wanted(make_prefill("x", range(8)))[:1]
    assert runner.runs == [[("a", 0, 8)], [("b", 4, 4)]]
    assert [b.block_id for b in outputs[-1].final_blocks] == [0, 2]
    assert engine.drain_cache_events().stored == tuple(map(short_hash, make_hasher().chain(range(8))))


def test_a_prefill_whose_first_token_ends_the_request_is_held_all_the_same() -> None:
    engine, _ = make_engine()
    engine.add(make_request("p", kind=RequestKind.PREFILL, sampling=make_sampling(max_tokens=1)))
    output = run_to_end(engine)["p"][-1]
    assert (len(output.tokens), output.finish_reason, engine.counts().num_held) == (1, None, 1)


def test_salts_keep_prefixes_apart() -> None:
    runner = RecordingRunner()
    engine, _ = make_engine(runner=runner)
    for name, salt in (("a", b"x"), ("b", b"y"), ("c", b"x")):
        engine.add(make_request(name, range(9), cache_salt=salt, sampling=make_sampling(max_tokens=1)))
        run_to_end(engine)
    assert runner.runs == [[("a", 0, 9)], [("b", 0, 9)], [("c", 8, 1)]]


def test_generated_tokens_are_found_by_the_next_turn_of_a_chat() -> None:
    engine, _ = make_engine()
    request = make_request("a", range(6), sampling=make_sampling(max_tokens=7))
    engine.add(request)
    reply = token_ids(run_to_end(engine)["a"])
    engine.add(make_request("b", (*range(6), *reply, 60), sampling=make_sampling(max_tokens=1)))
    stats = run_to_end(engine)["b"][-1].stats
    assert stats is not None and stats.num_cached_tokens == 12


def test_a_cancel_gives_one_output_and_every_block_back() -> None:
    engine, _ = make_engine()
    engine.add(make_request("running"))
    step(engine)
    engine.add(make_request("new"))
    for name in ("running", "new", "unknown", "running"):
        engine.cancel(RequestId(name))
    assert engine.has_work()
    outputs = step(engine)
    assert {name: each.finish_reason for name, each in outputs.items()} == {
        "running": FinishReason.CANCELLED,
        "new": FinishReason.CANCELLED,
    }
    assert engine.counts().held_blocks == 0 and engine.step() is None and not engine.has_work()


def test_a_held_prefill_that_is_cancelled_is_freed_without_an_output() -> None:
    engine, _ = make_engine()
    engine.add(make_prefill("p", range(6)))
    run_to_end(engine)
    engine.cancel(RequestId("p"))
    assert engine.counts().held_blocks == 0 and engine.step() is None


def test_a_release_ends_a_running_prefill_in_silence_and_touches_no_other_kind() -> None:
    engine, _ = make_engine(limits=make_limits(max_batch_tokens=4))
    engine.add(make_prefill("p", range(12)))
    step(engine)
    engine.release(RequestId("p"))
    assert engine.counts().held_blocks == 0 and engine.step() is None
    engine.add(make_request("a"))
    engine.release(RequestId("a"))
    assert reason(run_to_end(engine)["a"]) is FinishReason.LENGTH


def test_a_sequence_without_credit_pauses_until_it_is_granted_more() -> None:
    engine, _ = make_engine()
    request = make_request("a", credit=2)
    engine.add(request)
    assert token_ids(run_to_end(engine)["a"]) == wanted(request)[:2]
    assert (engine.counts().num_waiting, engine.counts().num_running, engine.has_work()) == (1, 0, True)
    engine.grant(RequestId("a"), 0, 0)
    assert engine.step() is None
    engine.grant(RequestId("a"), 0, 9)
    assert token_ids(run_to_end(engine)["a"]) == wanted(request)[2:]
    engine.grant(RequestId("a"), 0, 1)
    with pytest.raises(InvalidRequestError, match="a grant of -1"):
        engine.grant(RequestId("a"), 0, -1)


def test_a_request_that_makes_a_step_raise_fails_alone_in_the_same_step(caplog: pytest.LogCaptureFixture) -> None:
    engine, runner = make_engine()
    requests = [
        make_request(name, range(start, start + 6)) for name, start in zip("abcde", range(0, 50, 10), strict=True)
    ]
    for request in requests:
        engine.add(request)
    first = step(engine)
    runner.failing = {RequestId("b"), RequestId("d")}
    second = step(engine)
    assert list(second) == list("abcde")
    for name in "bd":
        error = second[name].error
        assert isinstance(error, StepFailedError) and second[name].finish_reason is FinishReason.ERROR
        assert "told to fail" not in error.message
        assert f"request {name}: its step raised RuntimeError" in caplog.text
    rest = run_to_end(engine)
    for request in requests:
        if request.request_id not in runner.failing:
            name = str(request.request_id)
            assert token_ids([first[name], second[name], *rest[name]]) == wanted(request)
    assert engine.counts().held_blocks == 0


class InterruptedRunner(FakeRunner):
    """Raises KeyboardInterrupt once, in its second run."""

    def run(self, slices: tuple[SequenceSlice, ...]) -> list[SliceResult]:
        if self.num_runs == 1:
            self.num_runs += 1
            raise KeyboardInterrupt
        return super().run(slices)


def test_an_interrupted_step_is_undone_and_may_be_repeated() -> None:
    engine, _ = make_engine(runner=InterruptedRunner(block_size=BLOCK_SIZE))
    request = make_request("a")
    engine.add(request)
    outputs = [step(engine)["a"]]
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine.check_integrity()
    outputs += run_to_end(engine)["a"]
    assert token_ids(outputs) == wanted(request)


def test_counts_are_read_from_what_they_describe() -> None:
    engine, _ = make_engine(num_blocks=20, limits=make_limits(max_batch_tokens=8))
    engine.add(make_prefill("p", range(6)))
    step(engine)
    engine.add(make_request("a", range(30, 40)))
    engine.add(make_request("b", range(50, 54)))
    step(engine)
    assert engine.counts() == EngineCounts(
        total_blocks=20,
        free_blocks=16,
        held_blocks=4,
        cached_blocks=0,
        quarantined_blocks=0,
        num_running=1,
        num_waiting=1,
        num_held=1,
        num_pending_tokens=6,
        engine_steps=2,
        num_copied_blocks=0,
    )


def test_durations_come_from_the_clock_and_decide_nothing() -> None:
    now = 0.0

    class SlowRunner(FakeRunner):
        """Takes five seconds for a step."""

        def run(self, slices: tuple[SequenceSlice, ...]) -> list[SliceResult]:
            nonlocal now
            now += 5.0
            return super().run(slices)

    runner = SlowRunner(block_size=BLOCK_SIZE)
    engine = Engine(runner, num_blocks=8, hasher=make_hasher(), limits=make_limits(), clock=lambda: now)
    engine.add(make_request("a", sampling=make_sampling(max_tokens=2)))
    now += 3.0
    stats = run_to_end(engine)["a"][-1].stats
    assert stats is not None and (stats.queue_s, stats.prefill_s) == (3.0, 5.0)
    assert (stats.num_local_prompt_tokens, stats.num_recomputed_tokens) == (6, 0)


def test_steps_are_numbered_and_news_comes_before_the_batch() -> None:
    engine, _ = make_engine()
    for name in "ab":
        engine.add(make_request(name))
    engine.cancel(RequestId("b"))
    output = engine.step()
    assert output is not None
    assert (output.step, [each.request_id for each in output.outputs]) == (1, ["b", "a"])
    assert output.outputs[1] == SequenceOutput(RequestId("a"), tokens=output.outputs[1].tokens)


def test_without_prefix_caching_nothing_is_kept() -> None:
    runner = RecordingRunner()
    engine, _ = make_engine(runner=runner, limits=make_limits(prefix_caching=False))
    for name in "ab":
        engine.add(make_request(name, range(9), sampling=make_sampling(max_tokens=1)))
        run_to_end(engine)
    assert runner.runs == [[("a", 0, 9)], [("b", 0, 9)]]
    assert (engine.counts().cached_blocks, engine.cache_snapshot().stored) == (0, ())


def test_the_bookkeeping_imports_neither_tensors_nor_the_wire() -> None:
    code = (
        "import sys, engine.thread, engine.fake\n"
        "banned = {'torch', 'numpy', 'grpc', 'google.protobuf'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(banned)) or 0)\n"
    )
    result = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
