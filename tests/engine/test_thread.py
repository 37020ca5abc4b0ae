"""The engine thread: order, sleep, waking, ends."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from queue import SimpleQueue

import pytest

from engine.cache.source import AttemptId
from engine.engine import Engine
from engine.fake import FakeRunner, FakeSource, expected_tokens
from engine.request import FinishReason, RequestId, StepOutput
from engine.thread import EngineThread
from staffetta.errors import InvalidRequestError, UnavailableError
from tests.engine.background import BackgroundFakeRunner
from tests.engine.making import BLOCK_SIZE, make_engine, make_hasher, make_limits, make_request, make_sampling

TIMEOUT_S = 20.0


class Receiver:
    """Collects outputs; `ended` is set with a finish reason."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.reasons: list[FinishReason] = []
        self.threads: set[str] = set()
        self.ended = threading.Event()

    def __call__(self, output: StepOutput) -> None:
        self.threads.add(threading.current_thread().name)
        for each in output.outputs:
            self.tokens += [token.token_id for token in each.tokens]
            if each.finish_reason is not None:
                self.reasons.append(each.finish_reason)
                self.ended.set()


@contextmanager
def running(thread: EngineThread) -> Iterator[EngineThread]:
    thread.start()
    try:
        yield thread
    finally:
        thread.stop()


def test_a_request_added_from_another_thread_is_served_on_the_engine_thread() -> None:
    engine, _ = make_engine()
    receiver = Receiver()
    request = make_request("a")
    with running(EngineThread(engine, on_output=receiver, name="the-engine")) as thread:
        thread.call(lambda e: e.add(request)).result(TIMEOUT_S)
        assert receiver.ended.wait(TIMEOUT_S)
    assert receiver.tokens == [token.token_id for token in expected_tokens(request)]
    assert receiver.threads == {"the-engine"}
    assert not thread.is_alive and thread.failure is None


class GatedRunner(BackgroundFakeRunner):
    """Its driver has a step to do only when `gate` was opened once more, after whatever came to the engine thread."""

    def __init__(self) -> None:
        super().__init__(block_size=BLOCK_SIZE, is_prompt=lambda: False)
        self.gate = threading.Semaphore(0)
        self.has_computed = threading.Semaphore(0)

    def about_to_return(self) -> None:
        self.has_computed.release()
        assert self.gate.acquire(timeout=TIMEOUT_S)
        if self.in_flight:
            self.in_flight[0].compute()


@pytest.mark.parametrize("way_in", ["call", "wake"])
def test_news_for_the_engine_is_taken_in_before_a_step_that_was_only_planned_ahead(way_in: str) -> None:
    runner = GatedRunner()
    engine = Engine(runner, num_blocks=32, hasher=make_hasher(), limits=make_limits())
    receiver = Receiver()
    request = make_request("a", sampling=make_sampling(max_tokens=4))
    ways_in: dict[str, Callable[[EngineThread], object]] = {
        "call": lambda thread: thread.call(lambda e: e.counts()),
        "wake": EngineThread.wake,
    }
    with running(EngineThread(engine, on_output=receiver)) as thread:
        thread.call(lambda e: e.add(request)).result(TIMEOUT_S)
        for num_ahead in (0, 1):  # the prompt's step is followed by none
            assert runner.has_computed.acquire(timeout=TIMEOUT_S)
            assert runner.num_ahead == num_ahead
            if num_ahead:
                planned = runner.in_flight[0]
                ways_in[way_in](thread)
            runner.gate.release()
        runner.gate.release(10)
        assert receiver.ended.wait(TIMEOUT_S)
    assert planned.is_refused and runner.num_holds_known == runner.num_holds
    assert receiver.tokens == [token.token_id for token in expected_tokens(request)]


def test_a_loop_that_ends_leaves_no_step_in_flight() -> None:
    runner = BackgroundFakeRunner(block_size=BLOCK_SIZE)
    engine = Engine(runner, num_blocks=32, hasher=make_hasher(), limits=make_limits())
    num_in_flight: list[int] = []
    failed = threading.Event()

    def on_output(_: StepOutput) -> None:
        num_in_flight.append(len(runner.in_flight))
        if num_in_flight[-1]:
            raise RuntimeError("the receiver broke")

    thread = EngineThread(engine, on_output=on_output, on_failure=lambda _: failed.set())
    with running(thread):
        thread.call(lambda e: e.add(make_request("a"))).result(TIMEOUT_S)
        assert failed.wait(TIMEOUT_S)
    assert num_in_flight == [0, 1] and not runner.in_flight


def test_a_refusal_comes_back_through_the_future_and_the_thread_lives() -> None:
    engine, _ = make_engine()
    with running(EngineThread(engine, on_output=Receiver())) as thread:
        with pytest.raises(InvalidRequestError, match="prompt is empty"):
            thread.call(lambda e: e.add(make_request("a", ()))).result(TIMEOUT_S)
        assert thread.call(lambda e: e.counts().num_waiting).result(TIMEOUT_S) == 0
        assert thread.is_alive


def test_a_submitted_command_that_is_refused_is_logged_and_the_thread_lives(caplog: pytest.LogCaptureFixture) -> None:
    engine, _ = make_engine()
    with running(EngineThread(engine, on_output=Receiver())) as thread:
        thread.submit(lambda e: e.grant(RequestId("a"), 0, -1))
        assert thread.call(lambda e: e.has_work()).result(TIMEOUT_S) is False
    assert "a grant of -1 tokens" in caplog.text


def test_commands_are_carried_out_in_the_order_of_submission() -> None:
    engine, _ = make_engine()
    seen: list[int] = []
    thread = EngineThread(engine, on_output=Receiver())
    for number in range(50):
        thread.submit(lambda _, number=number: seen.append(number))  # type: ignore[misc]
    with running(thread):
        thread.call(lambda _: None).result(TIMEOUT_S)
    assert seen == list(range(50))


def test_an_engine_without_work_sleeps_between_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = make_engine(num_blocks=4)
    engine.add(make_request("paused", range(4), credit=0))
    num_steps = 0
    step = engine.step

    def counted() -> StepOutput | None:
        nonlocal num_steps
        num_steps += 1
        return step()

    monkeypatch.setattr(engine, "step", counted)
    num_calls = 200
    with running(EngineThread(engine, on_output=Receiver())) as thread:
        thread.wake()
        for _ in range(num_calls):
            thread.call(lambda _: None).result(TIMEOUT_S)
    # One step at the start, one for the waking, at most one after each command; a loop that spins makes thousands.
    assert num_steps <= num_calls + 2


def test_waking_makes_the_engine_look_at_its_source() -> None:
    runner = FakeRunner(block_size=BLOCK_SIZE)
    threads: list[EngineThread] = []
    source = FakeSource(runner, block_size=BLOCK_SIZE, on_news=lambda: threads[0].wake())
    engine = Engine(runner, num_blocks=8, hasher=make_hasher(), limits=make_limits(), source=source)
    receiver = Receiver()
    request = make_request("a")
    attempt_id = AttemptId(1)
    with running(EngineThread(engine, on_output=receiver)) as thread:
        threads.append(thread)
        thread.call(lambda e: e.add(request)).result(TIMEOUT_S)
        thread.call(lambda _: None).result(TIMEOUT_S)  # the step that began the attempt is over
        source.ready(attempt_id)
        while source.attempts[attempt_id].block_ids is None:
            thread.call(lambda _: None).result(TIMEOUT_S)  # at most the step that the waking began is left to wait for
        thread.call(lambda _: source.land(attempt_id, 6)).result(TIMEOUT_S)
        source.send_first_tokens(attempt_id)
        assert receiver.ended.wait(TIMEOUT_S)
    assert receiver.tokens == [token.token_id for token in expected_tokens(request)][1:]


def test_a_crash_of_the_loop_is_kept_reported_and_fails_what_comes_later() -> None:
    engine, _ = make_engine()
    boom = RuntimeError("receiver broke")
    reported: list[BaseException] = []
    is_over = threading.Event()

    waiting: list[Future[object]] = []

    def on_output(output: StepOutput) -> None:
        waiting.append(thread.call(lambda e: e.counts()))
        raise boom

    def on_failure(error: BaseException) -> None:
        reported.append(error)
        is_over.set()

    thread = EngineThread(engine, on_output=on_output, on_failure=on_failure)
    with running(thread):
        thread.submit(lambda e: e.add(make_request("a")))
        assert is_over.wait(TIMEOUT_S)
        for future in (waiting[0], thread.call(lambda e: e.counts())):
            with pytest.raises(UnavailableError, match="has stopped"):
                future.result(TIMEOUT_S)
    assert reported == [boom] and thread.failure is boom and not thread.is_alive


def test_stopping_ends_the_thread_and_fails_waiting_calls() -> None:
    engine, _ = make_engine()
    thread = EngineThread(engine, on_output=Receiver())
    waiting = thread.call(lambda e: e.counts())
    thread.stop()
    thread.stop()
    for future in (waiting, thread.call(lambda e: e.counts())):
        with pytest.raises(UnavailableError, match="has stopped"):
            future.result(TIMEOUT_S)
    assert not thread.is_alive


def test_a_call_cancelled_in_time_is_not_carried_out() -> None:
    engine, _ = make_engine()
    thread = EngineThread(engine, on_output=Receiver())
    seen: list[str] = []
    thread.call(lambda _: seen.append("cancelled")).cancel()
    with running(thread):
        thread.call(lambda _: seen.append("called")).result(TIMEOUT_S)
    assert seen == ["called"]


def test_an_idle_loop_turns_once_when_told_so_that_a_wedged_one_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = make_engine()
    turns: SimpleQueue[int] = SimpleQueue()

    def nothing_to_do() -> None:
        turns.put(thread.num_turns)

    monkeypatch.setattr(engine, "step", nothing_to_do)
    thread = EngineThread(engine, on_output=Receiver())
    with running(thread):
        assert turns.get(timeout=TIMEOUT_S) == 1
        thread.turn()
        assert turns.get(timeout=TIMEOUT_S) == 2


def test_steps_ahead_make_way_for_calls_and_news_and_not_for_questions_and_signs_of_life(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, _ = make_engine()
    num_holds = 0

    def hold() -> None:
        nonlocal num_holds
        num_holds += 1

    monkeypatch.setattr(engine, "hold", hold)
    with running(EngineThread(engine, on_output=Receiver())) as thread:
        assert thread.ask(lambda e: e.counts()).result(TIMEOUT_S) == engine.counts()
        thread.turn()
        assert num_holds == 0
        thread.call(lambda e: None).result(TIMEOUT_S)
        assert num_holds == 1
        thread.wake()
        assert num_holds == 2
