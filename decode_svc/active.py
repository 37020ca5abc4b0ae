"""What a decode worker knows of one gateway's stream and of each request on it, up to the request's last event.

Event loop only; times are monotonic. It never talks to the engine: the servicer tells it what came of a request.
"""

import time
from dataclasses import dataclass, field

from decode_svc.handoff import HandoffRecord
from engine.request import RequestId, SampledToken, SequenceOutput
from staffetta.rpc.session import SessionPipe
from staffetta.rpc.status import failure_of
from staffetta.v1 import common_pb2, decode_pb2
from worker.admission import PromptParts
from worker.codec import finish_reason_to_proto, token_to_proto

EVENTS_PER_MESSAGE = 64
"""64 events with 20 alternatives for each token stay below the message bound."""

Pipe = SessionPipe[decode_pb2.DecodeSessionRequest, decode_pb2.DecodeSessionResponse]


@dataclass(slots=True, eq=False)
class GatewaySession:
    """One gateway's stream."""

    session_id: str
    gateway_id: str
    pipe: Pipe
    request_ids: set[RequestId] = field(default_factory=set)

    def send(self, events: list[decode_pb2.SequenceEvent]) -> None:
        """Queues `events` in messages below the bound, in order."""
        for first in range(0, len(events), EVENTS_PER_MESSAGE):
            step = decode_pb2.StepEvents(events=events[first : first + EVENTS_PER_MESSAGE])
            self.pipe.send(decode_pb2.DecodeSessionResponse(step=step))


@dataclass(slots=True, eq=False)
class ActiveRequest:
    """One request that has not ended. Times are monotonic."""

    session: GatewaySession
    start: decode_pb2.StartRequest
    started_at: float
    prompt: PromptParts | None = None
    first_token_at: float | None = None
    handed_over: SampledToken | None = None
    """The token that a hand-off brought and that was sent at once."""

    def unsent(self, tokens: tuple[SampledToken, ...]) -> list[common_pb2.Token]:
        """`tokens` without the one sent already: the engine draws it again if the hand-off was given up meanwhile."""
        sent = self.handed_over
        return [token_to_proto(token) for token in tokens if sent is None or token.index != sent.index]

    def contradicts(self, tokens: tuple[SampledToken, ...]) -> bool:
        """Whether the engine drew another token where one was sent already: what follows would not fit the client's."""
        sent = self.handed_over
        return sent is not None and any(t.index == sent.index and t.token_id != sent.token_id for t in tokens)

    def ending(
        self, sequence: SequenceOutput, record: HandoffRecord, *, decode_worker: str
    ) -> decode_pb2.SequenceEvent:
        """The request's last event: its last tokens, how it ended, and what it took."""
        event = decode_pb2.SequenceEvent(
            request_id=sequence.request_id,
            tokens=self.unsent(sequence.tokens),
            finish_reason=finish_reason_to_proto(sequence.finish_reason),
            summary=decode_pb2.SequenceSummary(
                handoff=common_pb2.HandoffReport(
                    prefill_worker=record.prefill_worker,
                    decode_worker=decode_worker,
                    transport=record.transport,
                    handoff_bytes=record.num_bytes,
                    handoff_blocks=record.num_blocks,
                    failed_handoffs=record.num_failed,
                    prefill_cached_tokens=record.prefill_cached_tokens,
                )
            ),
        )
        if sequence.error is not None:
            event.failure.CopyFrom(failure_of(sequence.error))
        if (stats := sequence.stats) is not None:
            event.summary.cached_tokens = stats.num_cached_tokens
            event.summary.num_preemptions = stats.num_preemptions
            event.summary.recomputed_tokens = stats.num_recomputed_tokens
            event.summary.handoff.locally_prefilled_tokens = stats.num_local_prompt_tokens
        queue_s = record.prefill_queue_s or (stats.queue_s if stats is not None else 0.0)
        event.summary.timings.CopyFrom(self._timings(queue_s=queue_s, landed_at=record.landed_at))
        return event

    def _timings(self, *, queue_s: float, landed_at: float | None) -> common_pb2.PhaseTimings:
        """Splits the time since the request started into phases that add up to it."""
        now = time.monotonic()
        first_token_at = now if self.first_token_at is None else self.first_token_at
        to_first_s = first_token_at - self.started_at
        queue_s = min(queue_s, to_first_s)
        transfer_s = 0.0 if landed_at is None else min(max(0.0, landed_at - first_token_at), now - first_token_at)
        return common_pb2.PhaseTimings(
            queue_s=queue_s,
            prefill_s=to_first_s - queue_s,
            transfer_s=transfer_s,
            decode_s=now - first_token_at - transfer_s,
        )
