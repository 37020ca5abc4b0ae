"""The one journey behind both doors: from a request to its events.

1. Admission: a bound on requests in flight.
2. Preparation, in a thread: checks, template, tokens, defaults, block hashes.
3. Routing: a pair of workers, now or when one registers, within the start timeout.
4. Relay: tokens of each choice become text; credit is granted as the client takes it; a stop string ends a choice.
5. The end: of every choice, usage, hand-off report and timings, exactly once; or one error for all; or, when the client
   is gone, a cancel.

A worker lost before the client has a token is replaced without the client noticing. That is exact, whichever worker
comes next: the seed is fixed, and the client has seen nothing that could differ. When it has the prompt's
log-probabilities, only a worker of the same numerics digest, where they are the same, may go on. Whatever happens in
whatever phase, the request is cancelled on its worker and forgotten here.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import replace
from functools import partial
from typing import Final, TypeVar

from gateway.admission import Admission
from gateway.metrics import InFlight, Metrics
from gateway.model import Model
from gateway.prepare import Prepared, detokenize, prepare, sampling_within, tokenize
from gateway.progress import Progress
from gateway.relay import Relay
from gateway.request import Event, JourneyRequest, Placed, Prompt, Started, TextSink, new_request_id
from gateway.router import Demand, Refusal, choose
from gateway.session import RequestStream
from gateway.workers import Workers
from staffetta import validate
from staffetta.config.schema import GatewayConfig
from staffetta.errors import (
    DrainingError,
    InvalidRequestError,
    NoWorkerError,
    QueueFullError,
    StaffettaError,
    WorkerLostError,
)
from staffetta.v1 import decode_pb2

MAX_ATTEMPTS: Final = 4
"""Workers tried for one request before the client hears of the last one's failure."""
NUM_THREADS: Final = 2

_ELSEWHERE: Final = (WorkerLostError, DrainingError, QueueFullError)
"""Failures of one worker that another may not have."""

T = TypeVar("T")

log = logging.getLogger(__name__)


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
        self._in_flight: set[Progress] = set()

    def in_flight(self) -> InFlight:
        """Requests under way."""
        num_running = sum(progress.num_tokens > 0 for progress in self._in_flight)
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

    async def in_thread(self, work: Callable[[], T]) -> T:
        """What `work` returns, done off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def tokenize(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, exactly as `run` computes them."""
        with self.admission.held():
            return list(await self.in_thread(partial(tokenize, prompt, self.model)))

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of token ids. Raises InvalidRequestError for too many, and for one that the vocabulary lacks."""
        with self.admission.held():
            return await self.in_thread(partial(detokenize, token_ids, self.model))

    async def run(self, request: JourneyRequest, *, sink: TextSink | None = None) -> AsyncGenerator[Event, None]:
        """The request's events: Started, Placed, PromptLogprobs, Deltas, and Finished for every choice. While `sink` is
        open, text goes there instead of into Deltas.

        Raises StaffettaError; who iterates closes it.
        """
        with self._admitted(request) as progress:
            prepared = await progress.within_deadline(self._prepare(request), "preparing the prompt")
            progress.num_prompt_tokens = len(prepared.token_ids)
            yield Started(progress.id, self.model.name, prepared.sampling.seed, prepared.token_ids)
            refused: dict[str, StaffettaError] = {}
            for attempt in range(MAX_ATTEMPTS):
                # A worker that is asked again must not take the new attempt for the old one.
                start = decode_pb2.StartRequest(
                    request_id=progress.id if attempt == 0 else new_request_id(),
                    on_prefill_failure=request.on_prefill_failure,
                    credit=self._config.credit_tokens,
                )
                dispatch = self._dispatch(start, prepared, refused, numerics_digest=progress.numerics_digest)
                stream = await progress.within_deadline(dispatch, "waiting for a worker")
                try:
                    yield Placed(stream.worker_id, stream.numerics_digest, stream.is_stalled)
                    relay = Relay(
                        progress,
                        prepared,
                        stream,
                        text=self.model.text,
                        metrics=self._metrics,
                        credit_tokens=self._config.credit_tokens,
                        sink=sink,
                    )
                    async with aclosing(relay.events()) as events:
                        async for event in events:
                            yield event
                    return
                except _ELSEWHERE as error:
                    if progress.num_tokens > 0 or attempt + 1 == MAX_ATTEMPTS:
                        raise
                    log.info("%s: %s failed it (%s); trying elsewhere", progress.id, stream.worker_id, error.reason)
                    if not isinstance(error, WorkerLostError):
                        refused[stream.worker_id] = error
                finally:
                    stream.close()

    @contextmanager
    def _admitted(self, request: JourneyRequest) -> Iterator[Progress]:
        """The request as one in flight; at its end, however it ends, it is counted and logged."""
        with self.admission.held(validate.num_choices(request.sampling)):
            progress = Progress(request)
            self._in_flight.add(progress)
            try:
                yield progress
            except StaffettaError:
                progress.outcome = "error"
                raise
            finally:
                self._in_flight.discard(progress)
                self._report(progress)

    def _report(self, progress: Progress) -> None:
        latency_s = asyncio.get_running_loop().time() - progress.arrival
        self._metrics.ended(
            progress.outcome,
            latency_s=latency_s,
            num_prompt_tokens=progress.num_prompt_tokens,
            num_tokens=progress.num_tokens,
        )
        log.info(
            "%s %s: %d prompt tokens, %d generated, %.3f s",
            progress.id,
            progress.outcome,
            progress.num_prompt_tokens,
            progress.num_tokens,
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
        return await self.in_thread(work)

    async def _dispatch(
        self,
        start: decode_pb2.StartRequest,
        prepared: Prepared,
        refused: Mapping[str, StaffettaError],
        *,
        numerics_digest: str,
    ) -> RequestStream:
        """Starts the request, as the rest of `start`, on the best pair that has not refused it, when there is one.

        Raises ContextLengthExceededError when there are workers and their contexts are all too short, and
        InvalidRequestError when none of them ever has room for so many choices.
        """
        give_up_at = asyncio.get_running_loop().time() + self._config.start_timeout_s
        while True:
            # At every turn: who is there decides how long the context is.
            sampling = sampling_within(prepared, replace(self.model.limits, max_model_len=self.max_model_len()))
            if (most := self._workers.max_requests()) is not None and sampling.n > most:
                raise InvalidRequestError(
                    f"n is {sampling.n} and the workers hold at most {most} choices each; lower it", param="n"
                )
            demand = Demand(
                num_prompt_tokens=len(prepared.token_ids),
                max_tokens=sampling.max_tokens,
                hashes=prepared.hashes,
                excluded=refused.keys(),
                num_choices=sampling.n,
                numerics_digest=numerics_digest,
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
        start.sampling.CopyFrom(sampling)
        start.prefill_worker = route.prefill_worker or ""
        return session.start(start, prepared.token_ids)
