"""A pytest plugin that breaks the rule on random numbers: it draws them from one stream, in the order of the batch."""

from collections.abc import Sequence
from itertools import count

import pytest
from torch import Tensor

from kernels.cpu.backend import CpuBackend
from kernels.sampling import TokenDraw


@pytest.fixture(autouse=True)
def draw_from_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    sample, stream = CpuBackend.sample, count()

    def sample_in_order(backend: CpuBackend, logits: Tensor, draws: Sequence[TokenDraw]) -> list[int]:
        return sample(backend, logits, [draw._replace(seed=0, output_index=next(stream)) for draw in draws])

    monkeypatch.setattr(CpuBackend, "sample", sample_in_order)
