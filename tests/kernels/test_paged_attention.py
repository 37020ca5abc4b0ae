"""Paged attention against loops over heads, queries and keys in float64."""

import math

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.backend import Spans


class Case:
    """Sequences with random keys, values and queries, scattered over shuffled blocks of NaN-filled pages."""

    def __init__(
        self, spans: list[tuple[int, int]], *, heads: int, kv_heads: int, dim: int, block_size: int, layer: int = 1
    ) -> None:
        """`spans` are (query rows, context) of each sequence."""
        generator = torch.Generator().manual_seed(3)
        self.spans, self.heads, self.layer, self.scale = spans, heads, layer, 1 / math.sqrt(dim)
        self.keys = [torch.randn(context, kv_heads, dim, generator=generator) for _, context in spans]
        self.values = [torch.randn(context, kv_heads, dim, generator=generator) for _, context in spans]
        self.queries = [torch.randn(rows, heads, dim, generator=generator) for rows, _ in spans]
        counts = [-(-context // block_size) for _, context in spans]
        # What no sequence wrote is NaN: whoever reads it shows.
        self.pages = torch.full((sum(counts) + 3, kv_heads, layer + 2, 2, block_size, dim), math.nan)
        free = torch.randperm(sum(counts) + 3, generator=generator).tolist()
        self.tables = [[free.pop() for _ in range(count)] for count in counts]
        for keys, values, table in zip(self.keys, self.values, self.tables, strict=True):
            slots = [table[p // block_size] * block_size + p % block_size for p in range(len(keys))]
            reference.write_kv(keys, values, self.pages, layer=layer, slots=torch.tensor(slots, dtype=torch.int64))

    def run(self, *chosen: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Runs the chosen sequences as one batch; returns each one's rows."""
        rows = [self.spans[s][0] for s in chosen]
        width = max((len(self.tables[s]) for s in chosen), default=0)
        tables = [self.tables[s] + [10**9] * (width - len(self.tables[s])) for s in chosen]
        spans = Spans(
            query_starts=torch.tensor([0, *torch.tensor(rows, dtype=torch.int64).cumsum(0).tolist()]),
            context_lens=torch.tensor([self.spans[s][1] for s in chosen], dtype=torch.int64),
            block_tables=torch.tensor(tables, dtype=torch.int64).view(len(chosen), width),
        )
        empty = torch.empty(0, self.heads, self.pages.shape[-1])
        query = torch.cat([empty, *(self.queries[s] for s in chosen)]).to(dtype)
        out = reference.paged_attention(query, self.pages.to(dtype), spans, layer=self.layer, scale=self.scale)
        assert out.dtype == dtype
        assert out.shape == query.shape
        return list(torch.split(out, rows))

    def expected(self, s: int) -> Tensor:
        """Loops, float64."""
        rows, context = self.spans[s]
        keys, values, queries = self.keys[s].double(), self.values[s].double(), self.queries[s].double()
        out = torch.zeros_like(queries)
        for row in range(rows):
            visible = context - rows + row + 1
            for head in range(self.heads):
                kv_head = head * keys.shape[1] // self.heads
                scores = torch.stack([self.scale * (queries[row, head] @ keys[j, kv_head]) for j in range(visible)])
                weights = (scores - scores.max()).exp()
                out[row, head] = (weights / weights.sum()) @ values[:visible, kv_head]
        return out


MIXED = [(1, 1), (1, 33), (5, 5), (7, 30), (1, 16), (16, 16), (3, 35)]
SHAPES = [
    {"heads": 6, "kv_heads": 2, "dim": 8, "block_size": 4},
    {"heads": 3, "kv_heads": 3, "dim": 5, "block_size": 1},
    {"heads": 4, "kv_heads": 1, "dim": 32, "block_size": 16},
    {"heads": 1, "kv_heads": 1, "dim": 2, "block_size": 64},
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s.values())))
def test_decode_prefill_and_chunks_in_one_batch_equal_the_formula(shape: dict[str, int]) -> None:
    case = Case(MIXED, **shape)
    for s, rows in enumerate(case.run(*range(len(MIXED)))):
        torch.testing.assert_close(rows.double(), case.expected(s), rtol=1e-5, atol=1e-5)


def test_bfloat16_differs_from_the_formula_by_its_own_rounding_alone() -> None:
    case = Case(MIXED, **SHAPES[2])
    for s, rows in enumerate(case.run(*range(len(MIXED)), dtype=torch.bfloat16)):
        torch.testing.assert_close(rows.double(), case.expected(s), rtol=3e-2, atol=3e-2)


def test_a_sequence_has_the_same_bits_alone_and_among_others() -> None:
    case = Case(MIXED, **SHAPES[0])
    together = case.run(*range(len(MIXED)))
    for s in range(len(MIXED)):
        assert torch.equal(case.run(s)[0], together[s])


def test_an_empty_batch_has_an_empty_result() -> None:
    assert Case([(1, 3)], **SHAPES[0]).run() == []


def test_strided_queries_and_pages_are_read_right() -> None:
    case = Case([(4, 9)], **SHAPES[0])
    whole = case.run(0)[0]
    case.queries[0] = torch.stack((case.queries[0], torch.zeros_like(case.queries[0])), -1)[..., 0]
    case.pages = torch.stack((case.pages, torch.zeros_like(case.pages)), -1)[..., 0]
    assert not case.pages.is_contiguous()
    torch.testing.assert_close(case.run(0)[0], whole)


def test_a_chunk_sees_what_the_whole_prefill_sees() -> None:
    whole = Case([(23, 23)], **SHAPES[0])
    rows = whole.run(0)[0]
    whole.spans, whole.queries = [(6, 23)], [whole.queries[0][-6:]]
    torch.testing.assert_close(whole.run(0)[0], rows[-6:], rtol=1e-6, atol=1e-6)
