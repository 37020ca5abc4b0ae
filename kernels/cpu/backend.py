"""The compiled kernels as a `Backend`: tensors in, tensors out, no arithmetic in between.

Results are bitwise equal whatever else is in the batch, however a prompt is cut into chunks, and for every number of
threads; the order that makes them so is in the sources under `src`, beside each formula. Values agree with
`kernels.reference` within rounding.
"""

import ctypes
from collections.abc import Callable, Sequence
from ctypes import byref
from pathlib import Path

import torch
from torch import Tensor

from kernels.backend import Batch, Definition, Linear, Rotation, Spans, WeightFormat, check_scales
from kernels.cpu import LIBRARY_PATH, sampling
from kernels.cpu import library as abi
from kernels.cpu.background import CpuBackgroundStep
from kernels.cpu.library import InstructionSet, WeightKind, check, matrix, pages_of_layer, rows
from kernels.cpu.linear import CpuLinear, interleave, pack, pack_with_screen
from kernels.cpu.memory import WeightMemory
from kernels.cpu.packing import CpuPacking
from kernels.cpu.step import CompiledStep
from kernels.reference import rope_tables
from kernels.rope import Rope
from kernels.sampling import TokenDraw, TokenScores


class CpuBackend:
    """The kernels of one instruction set on a number of threads. Immutable; any thread, one call at a time each."""

    def __init__(
        self, *, threads: int, instruction_set: InstructionSet | None = None, library_path: Path = LIBRARY_PATH
    ) -> None:
        """Takes the best instruction set of this machine, or, for tests, one that it has.

        Raises BackendUnavailableError when the library is not built, ValueError for a set this machine lacks or no
        threads.
        """
        if threads < 1:
            raise ValueError(f"threads is {threads}, needs at least 1")
        self.library: ctypes.CDLL = abi.load(library_path)
        best = InstructionSet(self.library.staffetta_instruction_set())
        self.isa = best if instruction_set is None else instruction_set
        if self.isa > best:
            raise ValueError(f"this machine has {best.name.lower()} at best, not {self.isa.name.lower()}")
        self.threads = threads
        self.weight_memory = WeightMemory()
        self._library_path = library_path
        self._sampler = sampling.Sampler(self)

    @property
    def name(self) -> str:
        """For people: `cpu (avx512)`."""
        return f"cpu ({self.instruction_set})"

    @property
    def abi_version(self) -> int:
        """Grows when the bits of any result may have changed."""
        return abi.ABI_VERSION

    @property
    def instruction_set(self) -> str:
        """`scalar`, `avx2` or `avx512`."""
        return self.isa.name.lower()

    def embedding(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        """See `kernels.reference.embedding`."""
        return self._take_rows(weight, token_ids, f"a token id is outside the vocabulary of {len(weight)}")

    def take_rows(self, x: Tensor, indices: Tensor) -> Tensor:
        """See `kernels.reference.take_rows`."""
        return self._take_rows(x, indices, f"an index is outside {len(x)} rows")

    def _take_rows(self, x: Tensor, indices: Tensor, out_of_range: str) -> Tensor:
        indices, table = indices.contiguous(), rows(x)
        out = table.new_empty(len(indices), table.shape[1])
        status = self.library.staffetta_embedding(indices.data_ptr(), byref(matrix(table)), byref(matrix(out)))
        check(status, out_of_range=out_of_range)
        return out

    def linear(
        self, layer: Linear, x: Tensor, *, residual: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Computes rows through a layer that was prepared here."""
        return layer(x, residual=residual, dtype=dtype)

    def compile_step(self, definition: Definition) -> Callable[[Batch, Tensor], tuple[Tensor, ...]]:
        """Records `definition` and returns it as one call. Raises ValueError or TypeError where it cannot be."""
        return CompiledStep(self, definition)

    def background_step(self, definition: Definition) -> CpuBackgroundStep | None:
        """Records `definition` for a driver; None on one thread, where nothing is left to compute beside its caller."""
        return CpuBackgroundStep(self, definition) if self.threads > 1 else None

    @property
    def packing(self) -> CpuPacking:
        """How prepared layers are kept between processes."""
        return CpuPacking(self, self._library_path.read_bytes())

    def prepare_linear(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        stored: WeightFormat = WeightFormat.AS_GIVEN,
        scales: Tensor | None = None,
    ) -> CpuLinear:
        """Packs weight [N, K] and bias [N]. float16 weights are kept as float32, int8 ones as they are."""
        check_scales(weight, scales, stored)
        return pack(self, weight, bias, kind=_kind(weight, stored), scales=scales, gated_outputs=None)

    def prepare_head(self, weight: Tensor) -> CpuLinear:
        """Packs weight [N, K], and in int8 once more: where a step draws the largest logits alone, those are all that
        it computes exactly (`src/largest.h`).
        """
        return pack_with_screen(self, weight, kind=_kind(weight, WeightFormat.AS_GIVEN))

    def prepare_gated_linear(
        self,
        gate: tuple[Tensor, Tensor | None],
        up: tuple[Tensor, Tensor | None],
        *,
        stored: WeightFormat = WeightFormat.AS_GIVEN,
        scales: tuple[Tensor, Tensor] | None = None,
    ) -> CpuLinear:
        """Packs the layer silu(gate(x)) up(x), from weight [N, K] and bias [N] of each. One pass over x."""
        weight = interleave(gate[0], up[0])
        bias = joined = None
        if gate[1] is not None and up[1] is not None:
            bias = interleave(gate[1][:, None], up[1][:, None])[:, 0]
        for (part, _), given in zip((gate, up), scales or (None, None), strict=True):
            check_scales(part, given, stored)
        if scales is not None:
            joined = interleave(scales[0][:, None], scales[1][:, None])[:, 0]
        return pack(self, weight, bias, kind=_kind(weight, stored), scales=joined, gated_outputs=len(gate[0]))

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `kernels.reference.rms_norm`."""
        return self._rms_norm(x, None, weight, eps)[0]

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See `kernels.reference.add_rms_norm`."""
        return self._rms_norm(x, residual, weight, eps)

    def _rms_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x = rows(x)
        other = None if residual is None else rows(residual)
        out, total = x.new_empty(x.shape), x if other is None else x.new_empty(x.shape)
        status = self.library.staffetta_rms_norm(
            self.isa,
            self.threads,
            byref(matrix(x)),
            byref(abi.NO_MATRIX if other is None else matrix(other)),
            byref(matrix(weight)),
            eps,
            byref(matrix(total)),
            byref(matrix(out)),
        )
        check(status, out_of_range="")
        return out, total

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        """See `kernels.reference.layer_norm`."""
        x = rows(x)
        out = x.new_empty(x.shape)
        status = self.library.staffetta_layer_norm(
            self.isa,
            self.threads,
            byref(matrix(x)),
            byref(abi.NO_MATRIX),
            byref(matrix(weight)),
            byref(abi.NO_MATRIX if bias is None else matrix(bias)),
            eps,
            byref(abi.NO_MATRIX),
            byref(matrix(out)),
        )
        check(status, out_of_range="")
        return out

    def rope_tables(self, rope: Rope, *, head_dim: int, num_positions: int) -> tuple[Tensor, Tensor]:
        """The reference's tables: made once, element by element."""
        return rope_tables(rope, head_dim=head_dim, num_positions=num_positions)

    def rotate_and_write(
        self, query: Tensor, kv: tuple[Tensor, Tensor], rotation: Rotation, *, pages: Tensor, layer: int, slots: Tensor
    ) -> Tensor:
        """See `kernels.reference.rotate_and_write`. Nothing is written when it raises."""
        if any(tensor.dtype != pages.dtype for tensor in (query, *kv)):
            raise ValueError(f"queries, keys and values must be {pages.dtype}, as the pages are")
        flat_query, keys, values = (_heads_as_rows(tensor) for tensor in (query, *kv))
        out = query.new_empty(query.shape)
        tables = rotation.cosines.contiguous(), rotation.sines.contiguous()
        indices = rotation.positions.contiguous(), slots.contiguous()
        call = abi.RotateArguments(
            matrix(flat_query),
            matrix(keys),
            matrix(values),
            matrix(out.view(len(out), query.shape[1] * query.shape[2])),
            *(tensor.data_ptr() for tensor in (*tables, *indices)),
        )
        arguments = byref(call), byref(pages_of_layer(pages, layer)), len(tables[0])
        status = self.library.staffetta_rotate_and_write(self.isa, self.threads, *arguments)
        check(status, out_of_range=f"a slot is outside {len(pages)} pages, or a position outside {len(tables[0])}")
        return out

    def paged_attention(
        self,
        query: Tensor,
        pages: Tensor,
        spans: Spans,
        *,
        layer: int,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> Tensor:
        """See `kernels.reference.paged_attention`. Raises IndexError for a block table that leaves the pages."""
        if pages.stride(-1) != 1 and pages.shape[-1] != 1:
            pages, layer = pages[:, :, layer : layer + 1].contiguous(), 0
        query = rows(query)
        out = query.new_empty(query.shape)
        tables = rows(spans.block_tables)
        starts, contexts = spans.query_starts.contiguous(), spans.context_lens.contiguous()
        call = abi.AttentionArguments(
            query=query.data_ptr(),
            out=out.data_ptr(),
            num_heads=query.shape[1],
            query_token_stride=query.stride(0),
            query_head_stride=query.stride(1),
            dtype=abi.DTYPES[query.dtype],
            num_sequences=len(contexts),
            max_blocks=tables.shape[1],
            table_stride=tables.stride(0),
            query_starts=starts.data_ptr(),
            context_lens=contexts.data_ptr(),
            block_tables=tables.data_ptr(),
            scale=scale,
            window=window or 0,
            soft_cap=soft_cap or 0.0,
        )
        status = self.library.staffetta_attention(
            self.isa, self.threads, byref(call), byref(pages_of_layer(pages, layer))
        )
        check(
            status,
            out_of_range=f"a context is shorter than its queries, or reaches outside its table or {len(pages)} pages",
            unsupported=f"query and pages differ in type, or more than {abi.MAX_GROUP} query heads share a KV head",
        )
        return out

    def log_softmax(self, logits: Tensor) -> Tensor:
        """See `kernels.reference.log_softmax`."""
        logits = rows(logits)
        out = torch.empty(logits.shape, dtype=torch.float32)
        arguments = byref(matrix(logits)), byref(matrix(out))
        check(self.library.staffetta_log_softmax(self.isa, self.threads, *arguments), out_of_range="")
        return out

    def sample(self, logits: Tensor, draws: Sequence[TokenDraw]) -> list[int]:
        """See `kernels.sampling.sample`."""
        return self._sampler.sample(logits, draws)

    def score_tokens(self, logits: Tensor, rows: Tensor, targets: Tensor, count: int) -> TokenScores:
        """See `kernels.sampling.score_tokens`."""
        return sampling.score_tokens(self, logits, at=rows, targets=targets, count=count)


def _kind(weight: Tensor, stored: WeightFormat) -> WeightKind:
    match stored:
        case WeightFormat.INT8_WEIGHT:
            return WeightKind.INT8_ONLY
        case WeightFormat.INT4:
            return WeightKind.INT4
        case WeightFormat.INT8:
            return WeightKind.INT8
        case WeightFormat.AS_GIVEN:
            return _KINDS.get(weight.dtype, WeightKind.FLOAT32)


_KINDS = {torch.int8: WeightKind.INT8, torch.bfloat16: WeightKind.BFLOAT16}
"""How weights are kept as they are given; all others are kept as float32."""


def _heads_as_rows(x: Tensor) -> Tensor:
    """[T, heads, D] as [T, heads x D], without a copy where heads lie side by side."""
    return rows(x.flatten(1))
