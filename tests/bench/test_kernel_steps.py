"""Steps of one kernel: as many calls as it takes to leave the caches, and no more than computing is worth."""

import pytest
import torch

from bench import kernel_steps
from bench.kernel_steps import attention_step, linear_steps
from bench.shapes import ModelShape
from kernels.backend import WeightFormat, select

SMALL = ModelShape(hidden_size=64, intermediate_size=96, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=16)
WEIGHT_BYTES = 96 * 64 * 4


def test_linear_layers_are_called_until_no_cache_holds_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_steps, "_COLD_BYTES", 3 * WEIGHT_BYTES + 1)
    weight, backend = torch.randn(96, 64), select("cpu")
    steps = linear_steps(backend, weight, WeightFormat.AS_GIVEN, weight_bytes=WEIGHT_BYTES, rows=(1, 5))
    assert [step.num_calls for step in steps.values()] == [4, 4]
    assert [steps[rows].run().shape for rows in (1, 5)] == [(1, 96), (5, 96)]
    assert torch.equal(steps[1].run(), steps[5].run()[:1])


def test_of_many_rows_as_many_calls_are_made_as_are_worth_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_steps, "_COLD_BYTES", 8 * WEIGHT_BYTES)
    monkeypatch.setattr(kernel_steps, "_ENOUGH_OPERATIONS", 3 * 2 * 5 * 96 * 64)
    weight, backend = torch.randn(96, 64), select("cpu")
    steps = linear_steps(backend, weight, WeightFormat.AS_GIVEN, weight_bytes=WEIGHT_BYTES, rows=(1, 5, 5000))
    assert [step.num_calls for step in steps.values()] == [8, 3, 1]


@pytest.mark.parametrize(("batch", "queries"), [(1, 1), (3, 1), (1, 32)])
def test_attention_is_computed_in_every_layer_of_a_pool(
    batch: int, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, layer_bytes = 32, batch * 32 * 2 * 2 * 16 * 2
    monkeypatch.setattr(kernel_steps, "_COLD_BYTES", 5 * layer_bytes)
    step = attention_step(select("cpu"), SMALL, torch.bfloat16, batch=batch, queries=queries, context=context)
    assert step.num_calls == 5
    attended = step.run()
    assert attended.shape == (batch * queries, 64)
    assert attended.dtype is torch.bfloat16
    assert torch.isfinite(attended.float()).all()
    # All sequences and layers hold the same keys and values, but for the first layer's latest.
    assert torch.equal(attended, attended[-queries:].repeat(batch, 1))
