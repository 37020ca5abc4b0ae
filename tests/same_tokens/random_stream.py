"""A pytest plugin that breaks the rule on random numbers: it draws them from one stream, in the order of the batch."""

import numpy as np
import pytest
from numpy.typing import NDArray

from engine import sampler


@pytest.fixture(autouse=True)
def draw_from_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = np.random.default_rng(0)

    def gumbel(token_ids: NDArray[np.int64], *, seed: int, choice: int, output_index: int) -> NDArray[np.float64]:
        del seed, choice, output_index
        return stream.gumbel(size=len(token_ids))

    monkeypatch.setattr(sampler, "gumbel", gumbel)
