"""What a prefill worker knows of one decode worker's stream and of each hand-off on it. Event loop only.

It never talks to the engine and never touches a block.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.request import PromptToken
from staffetta.rpc.session import SessionPipe
from staffetta.v1 import prefill_pb2
from worker.admission import PromptParts
from worker.codec import choices_from_proto, prompt_token_parts

EVENTS_PER_MESSAGE = 32
"""The first tokens of 32 hand-offs, each of 16 choices with 20 alternatives, stay below the message bound; chunks and a
prompt's log-probabilities have messages of their own."""

Pipe = SessionPipe[prefill_pb2.PrefillSessionRequest, prefill_pb2.PrefillSessionResponse]


@dataclass(slots=True, eq=False)
class ReaderSession:
    """One decode worker's stream."""

    session_id: str
    peer: str
    pipe: Pipe
    session_keys: dict[str, bytes] = field(default_factory=dict)
    handoffs: set[str] = field(default_factory=set)

    def send(self, events: list[prefill_pb2.PrefillEvent]) -> None:
        """Queues `events` in messages below the bound, in order."""
        for first in range(0, len(events), EVENTS_PER_MESSAGE):
            part = prefill_pb2.PrefillEvents(events=events[first : first + EVENTS_PER_MESSAGE])
            self.pipe.send(prefill_pb2.PrefillSessionResponse(events=part))

    def send_prompt_logprobs(self, handoff_id: str, tokens: Sequence[PromptToken]) -> None:
        """Queues log-probabilities of a prompt in messages below the bound, in order."""
        for part in prompt_token_parts(tokens):
            self.send(
                [
                    prefill_pb2.PrefillEvent(
                        handoff_id=handoff_id, prompt_logprobs=prefill_pb2.PromptLogprobs(tokens=part)
                    )
                ]
            )


@dataclass(slots=True, eq=False)
class Handoff:
    """One prefill for one session. `prompt` is None once the engine has it; `ticket` is empty until the first chunk."""

    session: ReaderSession
    start: prefill_pb2.StartPrefill
    prompt: PromptParts | None = None
    ticket: bytes = b""
    lease_ends: float = math.inf
    """From the first chunk on; renewed by every sign of life of the session."""
    held_until: float = math.inf
    """From the first chunk on; no sign of life goes beyond it."""
    choices: tuple[int, ...] = field(init=False)
    """Those whose first tokens are wanted."""

    def __post_init__(self) -> None:
        start = self.start
        self.choices = choices_from_proto(
            start.sampling, first_token_index=start.first_token_index, choice_index=start.choice_index
        )
