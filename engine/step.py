"""The values between scheduler and runner: what one step computes. No torch."""

from dataclasses import dataclass
from typing import Protocol

from engine.request import RequestId, SampledToken, SamplingParams
from kvtransfer.layout import BlockId


@dataclass(frozen=True, slots=True)
class SequenceSlice:
    """One sequence's part of a step: compute `token_ids`, the tokens at positions [start, start + len(token_ids)).

    `block_ids` covers every position up to the end of the slice. `sampling` is set when the slice ends at the last
    known token, so that the next one is drawn; `output_index` is then that token's output position (the random
    counter).
    """

    request_id: RequestId
    token_ids: tuple[int, ...]
    start: int
    block_ids: tuple[BlockId, ...]
    sampling: SamplingParams | None
    output_index: int


class Runner(Protocol):
    """Computes steps. The real one is `engine.runner.ModelRunner`; `engine.fake.FakeRunner` ships for tests."""

    def run(self, slices: tuple[SequenceSlice, ...]) -> list[SampledToken | None]:
        """Writes the slices' KV and returns, in order, the next token of each slice that samples, else None.

        Running the same slices again writes the same bytes, so a step that raised may be repeated in parts. Engine
        thread.
        """
