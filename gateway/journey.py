"""The one journey behind both doors: from a request to its events.

1. Admission: a bound on requests in flight.
2. Preparation, in a thread: checks, template, tokens, defaults, block hashes.
3. Routing: a pair of workers, now or when one registers, within the start timeout.
4. Relay: tokens from the decode session become text; credit is granted as the client takes it; a stop string ends it.
5. The end: usage, hand-off report and timings, exactly once; or one error; or, when the client is gone, a cancel.

A worker lost before the client has a token is replaced without the client noticing. Whatever happens in whatever phase,
the request is cancelled on its worker and forgotten here.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import replace
from functools import partial
from typing import Final, TypeVar

from gateway.admission import Admission
from gateway.metrics import InFlight, Metrics
from gateway.model import Model
from gateway.output import Output
from gateway.prepare import Prepared, detokenize, prepare, sampling_within, tokenize
from gateway.request import Delta, Event, Finished, JourneyRequest, Placed, Prompt, Started, new_request_id
from gateway.router import Demand, Refusal, choose
from gateway.session import RequestStream
from gateway.workers import Workers
from staffetta.config.schema import GatewayConfig
from staffetta.errors import (
    DeadlineError,
    DrainingError,
    NoWorkerError,
    QueueFullError,
    StaffettaError,
    WorkerLostError,
)
from staffetta.v1 import common_pb2, decode_pb2

MAX_ATTEMPTS: Final = 4
"""Workers tried for one request before the client hears of the last one's failure."""
SUMMARY_TIMEOUT_S: Final = 1.0
"""How long the end of a request cut by a stop string waits for the worker's summary."""
NUM_THREADS: Final = 2

_ELSEWHERE: Final = (WorkerLostError, DrainingError, QueueFullError)
"""Failures of one worker that another may not have."""

T = TypeVar("T")

log = logging.getLogger(__name__)


class _Journey:
    """One request under way: where it is, and since when."""

    def __init__(self, request: JourneyRequest) -> None:
        self.id: Final = request.id
        self.arrival: Final = request.arrival
        self.deadline: Final = request.deadline
        self.num_prompt_tokens = 0
        self.num_tokens = 0
        self.last_token_at = 0.0
        self.outcome = "abort"

    async def within_deadline(self, awaitable: Awaitable[T], phase: str) -> T:
        """Awaits, for no longer than the deadline allows. Raises DeadlineError that names the phase."""
        try:
            async with asyncio.timeout_at(self.deadline):
                return await awaitable
        except TimeoutError:
            raise DeadlineError(f"the deadline passed while {phase}; allow more time or ask for less") from None


class Journeys:
    """All requests in flight. Event loop only, but for its thread pool."""

    def __init__(
        self, model: Model, workers: Workers, metrics: Metrics, *, config: GatewayConfig, cluster_key: bytes
    ) -> None:
        self.model: Final = model
        self._workers = workers
        self._metrics = metrics
        self._config = config
        self.admission: Final = Admission(config.max_requests)
        self._cluster_key = cluster_key
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="tokenize")
        self._in_flight: set[_Journey] = set()

    def in_flight(self) -> InFlight:
        """Requests under way."""
        num_running = sum(journey.num_tokens > 0 for journey in self._in_flight)
        return InFlight(num_running, len(self._in_flight) - num_running)

    def reason_not_ready(self) -> str | None:
        """Why a request sent now would not be served; None when it would."""
        if self.admission.is_draining:
            return "the gateway is draining"
        if self._workers.max_model_len() is None:
            return "no decode worker has a session"
        return None

    def max_model_len(self) -> int:
        """What the model and the best of the workers allow."""
        return min(self.model.limits.max_model_len, self._workers.max_model_len() or self.model.limits.max_model_len)

    def close(self) -> None:
        """Ends the thread pool."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def tokenize(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, exactly as `run` computes them."""
        with self.admission.held():
            return list(await asyncio.get_running_loop().run_in_executor(self._pool, tokenize, prompt, self.model))

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of token ids. Raises InvalidRequestError for too many, and for one that the vocabulary lacks."""
        with self.admission.held():
            return await asyncio.get_running_loop().run_in_executor(self._pool, detokenize, token_ids, self.model)

    async def run(self, request: JourneyRequest) -> AsyncGenerator[Event, None]:
        """The request's events: Started, Placed, Deltas, Finished. Raises StaffettaError; who iterates closes it."""
        with self._admitted(request) as journey:
            prepared = await journey.within_deadline(self._prepare(request), "preparing the prompt")
            journey.num_prompt_tokens = len(prepared.token_ids)
            yield Started(journey.id, self.model.name, prepared.sampling.seed, prepared.token_ids)
            refused: dict[str, StaffettaError] = {}
            for attempt in range(MAX_ATTEMPTS):
                # A worker that is asked again must not take the new attempt for the old one.
                request_id = journey.id if attempt == 0 else new_request_id()
                dispatch = self._dispatch(request, prepared, request_id, refused)
                stream = await journey.within_deadline(dispatch, "waiting for a worker")
                try:
                    yield Placed(stream.worker_id, stream.is_stalled)
                    async with aclosing(self._relay(journey, prepared, stream)) as events:
                        async for event in events:
                            yield event
                    return
                except _ELSEWHERE as error:
                    if journey.num_tokens > 0 or attempt + 1 == MAX_ATTEMPTS:
                        raise
                    log.info("%s: %s failed it (%s); trying elsewhere", journey.id, stream.worker_id, error.reason)
                    if not isinstance(error, WorkerLostError):
                        refused[stream.worker_id] = error
                finally:
                    stream.close()

    @contextmanager
    def _admitted(self, request: JourneyRequest) -> Iterator[_Journey]:
        """The request as one in flight; at its end, however it ends, it is counted and logged."""
        with self.admission.held():
            journey = _Journey(request)
            self._in_flight.add(journey)
            try:
                yield journey
            except StaffettaError:
                journey.outcome = "error"
                raise
            finally:
                self._in_flight.discard(journey)
                self._report(journey)

    def _report(self, journey: _Journey) -> None:
        latency_s = asyncio.get_running_loop().time() - journey.arrival
        self._metrics.ended(
            journey.outcome,
            latency_s=latency_s,
            num_prompt_tokens=journey.num_prompt_tokens,
            num_tokens=journey.num_tokens,
        )
        log.info(
            "%s %s: %d prompt tokens, %d generated, %.3f s",
            journey.id,
            journey.outcome,
            journey.num_prompt_tokens,
            journey.num_tokens,
            latency_s,
        )

    async def _prepare(self, request: JourneyRequest) -> Prepared:
        work = partial(
            prepare,
            request,
            self.model,
            max_model_len=self.max_model_len(),
            cluster_key=self._cluster_key,
            block_sizes={worker.block_size for worker in self._workers},
        )
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def _dispatch(
        self, request: JourneyRequest, prepared: Prepared, request_id: str, refused: Mapping[str, StaffettaError]
    ) -> RequestStream:
        """Starts the request on the best pair that has not refused it, when there is one.

        Raises ContextLengthExceededError when there are workers and their contexts are all too short.
        """
        give_up_at = asyncio.get_running_loop().time() + self._config.start_timeout_s
        while True:
            # At every turn: who is there decides how long the context is.
            sampling = sampling_within(prepared, replace(self.model.limits, max_model_len=self.max_model_len()))
            demand = Demand(
                num_prompt_tokens=len(prepared.token_ids),
                max_tokens=sampling.max_tokens,
                hashes=prepared.hashes,
                excluded=refused.keys(),
            )
            route = choose(self._workers.snapshot(), demand)
            if not isinstance(route, Refusal):
                break
            if refused:
                raise list(refused.values())[-1]
            if route is Refusal.FULL:
                raise QueueFullError(f"{route.value}; send the request again later")
            try:
                async with asyncio.timeout_at(give_up_at):
                    await self._workers.wait_for_change()
            except TimeoutError:
                raise NoWorkerError(f"{route.value}, after {self._config.start_timeout_s:g} s of waiting") from None
        session = self._workers.take(route, num_prompt_tokens=len(prepared.token_ids))
        start = decode_pb2.StartRequest(
            request_id=request_id,
            sampling=sampling,
            prefill_worker=route.prefill_worker or "",
            on_prefill_failure=request.on_prefill_failure,
            credit=self._config.credit_tokens,
        )
        return session.start(start, prepared.token_ids)

    async def _relay(
        self, journey: _Journey, prepared: Prepared, stream: RequestStream
    ) -> AsyncGenerator[Delta | Finished, None]:
        """One worker's events as the client's. Ends with Finished, or raises what ended the request."""
        output = Output(self.model.text, prepared)
        num_ungranted = 0
        while True:
            phase = "generating" if journey.num_tokens else "waiting for the first token"
            event = await journey.within_deadline(stream.next(), phase)
            if event.finish_reason == common_pb2.FINISH_REASON_CANCELLED:
                raise DrainingError("the worker gave the request up because it is about to end; send it again")
            delta = output.take(event.tokens)
            has_ended = event.finish_reason != common_pb2.FINISH_REASON_UNSPECIFIED
            if has_ended:
                delta = Delta(delta.text + output.flush(), delta.tokens)
            if delta.tokens or delta.text:
                self._observe(journey, len(delta.tokens))
                yield delta
            if has_ended or output.stop_string is not None:
                yield await self._finish(journey, output, event, stream)
                return
            # The client has taken what was yielded: only now may the worker produce as much again.
            num_ungranted += len(delta.tokens)
            if 2 * num_ungranted >= self._config.credit_tokens:
                stream.grant(num_ungranted)
                num_ungranted = 0

    def _observe(self, journey: _Journey, num_tokens: int) -> None:
        now = asyncio.get_running_loop().time()
        if journey.num_tokens == 0:
            self._metrics.time_to_first_token.observe(now - journey.arrival)
        else:
            for _ in range(num_tokens):
                self._metrics.inter_token_latency.observe((now - journey.last_token_at) / num_tokens)
        journey.num_tokens += num_tokens
        journey.last_token_at = now

    async def _finish(
        self, journey: _Journey, output: Output, event: decode_pb2.SequenceEvent, stream: RequestStream
    ) -> Finished:
        has_stop_string = output.stop_string is not None
        reason = common_pb2.FINISH_REASON_STOP if has_stop_string else event.finish_reason
        summary = event.summary
        if event.finish_reason == common_pb2.FINISH_REASON_UNSPECIFIED:
            summary = await _summary_of_cancelled(journey, stream)
        timings = common_pb2.PhaseTimings()
        timings.CopyFrom(summary.timings)
        total_s = asyncio.get_running_loop().time() - journey.arrival
        elsewhere_s = timings.queue_s + timings.prefill_s + timings.transfer_s + timings.decode_s
        timings.gateway_s = max(0.0, total_s - elsewhere_s)
        usage = common_pb2.Usage(
            prompt_tokens=journey.num_prompt_tokens,
            completion_tokens=output.num_tokens,
            cached_tokens=summary.cached_tokens,
        )
        journey.outcome = "length" if reason == common_pb2.FINISH_REASON_LENGTH else "stop"
        handoff = common_pb2.HandoffReport()
        handoff.CopyFrom(summary.handoff)
        handoff.decode_worker = handoff.decode_worker or stream.worker_id
        self._metrics.summarized(summary)
        return Finished(reason, usage, handoff, timings, output.stop_string)


async def _summary_of_cancelled(journey: _Journey, stream: RequestStream) -> decode_pb2.SequenceSummary:
    """Cancels a request that has all it needs, and waits, not for long, for what the worker says of it."""
    stream.cancel()
    try:
        async with asyncio.timeout(SUMMARY_TIMEOUT_S):
            while True:
                event = await stream.next()
                if event.finish_reason != common_pb2.FINISH_REASON_UNSPECIFIED:
                    return event.summary
    except (TimeoutError, StaffettaError) as error:
        log.info("%s: cut by a stop string, without the worker's summary: %s", journey.id, type(error).__name__)
        return decode_pb2.SequenceSummary()
