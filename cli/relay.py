"""An answer and its hand-off, as clients report them: the line under each answer, and the JSON object."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Answer:
    """One finished generation, as its client saw it."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    prefill_worker: str
    """Empty when the decode worker prefilled."""
    decode_worker: str
    transport: str
    handoff_bytes: int
    handoff_blocks: int
    failed_handoffs: int
    first_token_s: float
    """From sending the request to its first token or text."""
    total_s: float

    def as_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)


def relay_line(answer: Answer) -> str:
    """`relay  prefill-0 → decode-0 · 1.2 MiB over shm · first token 41 ms · 18 tokens`."""
    if answer.prefill_worker:
        parts = [f"{answer.prefill_worker} → {answer.decode_worker}"]
        moved = f"{format_bytes(answer.handoff_bytes)} over {answer.transport}"
        parts.append(moved if answer.handoff_bytes else "nothing to move")
    else:
        parts = [f"{answer.decode_worker} alone"]
    if answer.failed_handoffs:
        parts.append(_count(answer.failed_handoffs, "failed hand-off"))
    if answer.cached_tokens:
        parts.append(f"{answer.cached_tokens} of {answer.prompt_tokens} prompt tokens cached")
    parts.append(f"first token {answer.first_token_s * 1000:.0f} ms")
    parts.append(_count(answer.completion_tokens, "token"))
    return "relay  " + " · ".join(parts)


def format_bytes(count: float) -> str:
    """In the unit that leaves one to four digits before the point: 512 B, 24 KiB, 1.2 MiB."""
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB"):
        count /= 1024
        if count < 1024:
            return f"{count:.1f} {unit}".replace(".0 ", " ")
    return f"{count / 1024:.1f} GiB".replace(".0 ", " ")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
