"""One attempt of a request on one decode worker: the news of its choices, as they come, as the client's events.

Each choice has text, stop strings, credit and one ending of its own; an error of any of them is the request's. A choice
that ended here, by a stop string, is cancelled on the worker at once, so that its blocks are free, and what still comes
of it is dropped. Its ending is told with the worker's summary of it, when the worker has ended it too; where nothing
else is waited for, before long without one. Never ends the stream: who opened it closes it.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from functools import partial
from typing import Final

from gateway.metrics import Metrics
from gateway.output import Output
from gateway.prepare import Prepared
from gateway.progress import Progress
from gateway.request import Delta, Finished, PromptLogprobs, TextSink
from gateway.session import RequestStream
from gateway.text import Text
from staffetta.errors import DrainingError, InternalError, StaffettaError
from staffetta.v1 import common_pb2, decode_pb2

SUMMARY_TIMEOUT_S: Final = 1.0
"""How long the end of a request whose last choices were cut by stop strings waits for the worker's summaries."""

log = logging.getLogger(__name__)


class _Choice:
    """One choice that the client has not been told the end of."""

    def __init__(self, output: Output) -> None:
        self.output = output
        self.num_ungranted = 0

    @property
    def is_cut(self) -> bool:
        """Whether a stop string ended it."""
        return self.output.stop_string is not None


class Relay:
    """The choices of one attempt. Event loop only."""

    def __init__(
        self,
        progress: Progress,
        prepared: Prepared,
        stream: RequestStream,
        *,
        text: Text,
        metrics: Metrics,
        credit_tokens: int,
        sink: TextSink | None = None,
    ) -> None:
        self._progress = progress
        self._stream = stream
        self._metrics = metrics
        self._credit_tokens = credit_tokens
        self._scores_prompt = prepared.sampling.HasField("prompt_logprobs")
        self._open = {
            index: _Choice(Output(text, prepared, choice_index=index)) for index in range(prepared.sampling.n)
        }
        self._has_summary = False
        # Stop strings hold text back and end choices, prompts' scores come first: neither is a matter of text alone.
        if sink is not None and not prepared.stop and not self._scores_prompt:
            stream.take_at_once(partial(self._take, sink))

    async def events(self) -> AsyncGenerator[PromptLogprobs | Delta | Finished, None]:
        """The attempt's events. Ends with the last choice's Finished, or raises what ended the request."""
        while not all(choice.is_cut for choice in self._open.values()):
            phase = "generating" if self._progress.num_tokens else "waiting for the first token"
            event = await self._progress.within_deadline(self._stream.next(), phase)
            if scored := self._progress.prompt.take(event.prompt_tokens):
                self._progress.numerics_digest = self._stream.numerics_digest
                yield PromptLogprobs(scored)
            choice = self._choice_of(event)
            was_cut = choice.is_cut
            if event.finish_reason == common_pb2.FINISH_REASON_CANCELLED and not was_cut:
                raise DrainingError("the worker gave the request up because it is about to end; send it again")
            has_ended = event.finish_reason != common_pb2.FINISH_REASON_UNSPECIFIED
            delta = choice.output.take(event.tokens)
            if has_ended:
                delta = Delta(delta.choice_index, delta.text + choice.output.flush(), delta.tokens)
            if delta.tokens or delta.text:
                if self._scores_prompt:
                    self._progress.prompt.check_whole(self._progress.num_prompt_tokens)
                self._progress.tokens_came(delta.choice_index, len(delta.tokens), self._metrics)
                yield delta
            if has_ended:
                yield self._finish(event.choice_index, event.finish_reason, event.summary)
            elif not choice.is_cut:
                self._grant(choice, delta.choice_index, len(delta.tokens))
            elif not was_cut:
                self._stream.cancel(delta.choice_index)
        if self._open:
            summaries = await self._sum_up()
            for index in tuple(self._open):
                summary = summaries.get(index, decode_pb2.SequenceSummary())
                yield self._finish(index, common_pb2.FINISH_REASON_STOP, summary)

    def _take(self, sink: TextSink, event: decode_pb2.SequenceEvent) -> bool:
        """Takes the next token of a choice to `sink`; False, having done nothing, for whatever else comes.

        Called while `events` waits for news, so that everything before has been taken.
        """
        index = event.choice_index
        choice = self._open.get(index)
        tokens = event.tokens
        if choice is None or len(tokens) != 1 or not sink.is_open():
            return False
        token = tokens[0]
        if token.index != choice.output.num_tokens:
            return False
        text = choice.output.push(token.token_id)
        self._progress.tokens_came(index, 1, self._metrics)
        if text:
            sink.put(index, text)
        self._grant(choice, index, 1)
        return True

    def _choice_of(self, event: decode_pb2.SequenceEvent) -> _Choice:
        if (choice := self._open.get(event.choice_index)) is None:
            raise InternalError(f"news came of choice {event.choice_index}, which has ended or was not asked for")
        return choice

    def _grant(self, choice: _Choice, index: int, num_tokens: int) -> None:
        """Lets the worker produce as much of a choice as the client has taken; it has, once its event was yielded."""
        choice.num_ungranted += num_tokens
        if 2 * choice.num_ungranted >= self._credit_tokens:
            self._stream.grant(index, choice.num_ungranted)
            choice.num_ungranted = 0

    def _finish(
        self, index: int, reason: common_pb2.FinishReason.ValueType, summary: decode_pb2.SequenceSummary
    ) -> Finished:
        """The end of a choice. Counts the hand-off once for the request: every choice tells of the same one."""
        choice = self._open.pop(index)
        if choice.is_cut:
            reason = common_pb2.FINISH_REASON_STOP
        timings = common_pb2.PhaseTimings()
        timings.CopyFrom(summary.timings)
        total_s = asyncio.get_running_loop().time() - self._progress.arrival
        elsewhere_s = timings.queue_s + timings.prefill_s + timings.transfer_s + timings.decode_s
        timings.gateway_s = max(0.0, total_s - elsewhere_s)
        usage = common_pb2.Usage(
            prompt_tokens=self._progress.num_prompt_tokens,
            completion_tokens=choice.output.num_tokens,
            cached_tokens=summary.cached_tokens,
        )
        handoff = common_pb2.HandoffReport()
        handoff.CopyFrom(summary.handoff)
        handoff.decode_worker = handoff.decode_worker or self._stream.worker_id
        self._progress.outcome = "length" if reason == common_pb2.FINISH_REASON_LENGTH else "stop"
        if not self._has_summary:
            self._metrics.handed_over(summary)
            self._has_summary = True
        self._metrics.recomputed(summary)
        is_by_token = reason == common_pb2.FINISH_REASON_STOP and not choice.is_cut
        return Finished(
            choice_index=index,
            finish_reason=reason,
            usage=usage,
            handoff=handoff,
            timings=timings,
            stop_string=choice.output.stop_string,
            stop_token_id=choice.output.stop_token_id if is_by_token else None,
        )

    async def _sum_up(self) -> Mapping[int, decode_pb2.SequenceSummary]:
        """Waits, not for long, for what the worker says of the choices that are left, all cut and cancelled."""
        summaries: dict[int, decode_pb2.SequenceSummary] = {}
        try:
            async with asyncio.timeout(SUMMARY_TIMEOUT_S):
                while not self._open.keys() <= summaries.keys():
                    event = await self._stream.next()
                    if event.finish_reason != common_pb2.FINISH_REASON_UNSPECIFIED:
                        summaries[event.choice_index] = event.summary
        except (TimeoutError, StaffettaError) as error:
            log.info(
                "%s: cut by a stop string, without the worker's summary: %s", self._progress.id, type(error).__name__
            )
        return summaries
