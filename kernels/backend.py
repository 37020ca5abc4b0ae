"""The operations a model is written in, and the choice of who computes them.

`reference` is the specification of the values and states every operation's full contract; other backends agree with it
within tolerance, and with themselves as their own docstrings promise. Choosing one happens here and nowhere else;
nothing is loaded or built until it is chosen.
"""

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from kernels.rope import Rope
from kernels.sampling import TokenDraw, TokenScores

if TYPE_CHECKING:
    from kernels.background import BackgroundStep


@dataclass(frozen=True, slots=True, eq=False)
class Spans:
    """Where each sequence's queries lie in a flat batch, and where its keys and values lie in the pages.

    All int64 on the CPU. Sequence s owns query rows [query_starts[s], query_starts[s + 1]); they are its *last*
    positions: its context, the keys it may see, is context_lens[s] tokens including them. Its block i is page
    block_tables[s, i].

    query_starts: [num_sequences + 1], rising from 0. context_lens: [num_sequences], at least the sequence's query rows.
    block_tables: [num_sequences, max_blocks]; entries past a sequence's context are never read.
    """

    query_starts: Tensor
    context_lens: Tensor
    block_tables: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """All token rows of a step, sequence after sequence, as one run of 64-bit numbers; the properties are views of it.

    numbers: token_ids, positions, slots, [num_tokens] each, slots being where a row's key and value go (block id x
    block size + offset); query_starts [num_sequences + 1], context_lens [num_sequences], block_tables [num_sequences,
    max_blocks], see `Spans`; drawn_rows [num_drawn] and scored_rows [num_scored], rows of the step whose logits are
    wanted. A row may be among both.

    One run, because making a tensor costs a step more than filling it does: what computes steps in one call reads the
    numbers where they lie.
    """

    numbers: "array[int]"
    num_tokens: int
    num_sequences: int
    max_blocks: int
    num_drawn: int
    num_scored: int

    def __post_init__(self) -> None:
        """Raises ValueError when there are more or fewer numbers than the counts say."""
        if self.numbers.typecode != "q" or len(self.numbers) != self._starts[-1]:
            raise ValueError(f"a batch of {self._starts[-1]} int64 has {len(self.numbers)} {self.numbers.typecode}")

    @property
    def token_ids(self) -> Tensor:
        """[num_tokens], int64."""
        return self._view(0)

    @property
    def positions(self) -> Tensor:
        """[num_tokens], int64."""
        return self._view(1)

    @property
    def slots(self) -> Tensor:
        """[num_tokens], int64."""
        return self._view(2)

    @property
    def spans(self) -> Spans:
        """Where sequences begin, their contexts and block tables."""
        return Spans(self._view(3), self._view(4), self._view(5).view(self.num_sequences, self.max_blocks))

    @property
    def drawn_rows(self) -> Tensor:
        """[num_drawn], int64."""
        return self._view(6)

    @property
    def scored_rows(self) -> Tensor:
        """[num_scored], int64."""
        return self._view(7)

    @property
    def _starts(self) -> tuple[int, ...]:
        """Where each part of the numbers begins, and where the last one ends."""
        tokens, sequences = self.num_tokens, self.num_sequences
        sizes = (tokens, tokens, tokens, sequences + 1, sequences, sequences * self.max_blocks)
        return (0, *accumulate((*sizes, self.num_drawn, self.num_scored)))

    def _view(self, part: int) -> Tensor:
        return torch.frombuffer(self.numbers, dtype=torch.int64)[self._starts[part] : self._starts[part + 1]]


class Rotation(NamedTuple):
    """Rotary angles of a step's rows.

    cosines, sines: [num_positions, head_dim / 2], float32, from `rope_tables`. positions: [T], int64, which row of the
    tables turns which row of the step.
    """

    cosines: Tensor
    sines: Tensor
    positions: Tensor


class BackendUnavailableError(RuntimeError):
    """What a backend computes with is not there, or does not fit this code. The message names the fix."""


class WeightFormat(Enum):
    """How a linear layer's weights are stored and multiplied."""

    AS_GIVEN = "none"
    """In the dtype they come in, with float32 sums; weights that come as int8, with their scales, as INT8."""
    INT8 = "int8"
    """int8 with a scale per output, times activations quantized to int8 with a scale per row; sums are integers."""
    INT8_WEIGHT = "int8-weight"
    """int8 with a scale per output, times activations as they are, with float32 sums."""
    INT4 = "int4"
    """Four bits, with a scale per output and group of inputs, times activations as they are, with float32 sums."""


class Linear(Protocol):
    """A linear layer whose weights are where its backend wants them. Made by a backend, immutable, used by it alone."""

    def __call__(self, x: Tensor, *, residual: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Computes rows [T, in] into [T, out], plus `residual` [T, out], if any, before the one rounding to `dtype`.

        That is x's where it is None, or else float32: rows that are asked for so are computed as if x were float32.
        x may be wider than the weights.
        """


class Packing(Protocol):
    """How a backend's linear layers are kept where other processes find them, so that each is prepared once."""

    @property
    def version(self) -> str:
        """Names what the tensors mean: those of another version say nothing here."""

    def tensors(self, layer: Linear) -> Mapping[str, Tensor]:
        """A prepared layer as named tensors [n] or [n, m], contiguous, to be read only. TypeError for others'."""

    def restore(self, tensors: Mapping[str, Tensor]) -> Linear:
        """The layer again, over the memory of `tensors`, which may be read-only. Bits of results are the same.

        Raises ValueError for tensors whose names, types or sizes are not those of a layer; contents are believed.
        """


def check_scales(weight: Tensor, scales: Tensor | None, stored: WeightFormat) -> None:
    """Raises ValueError unless a weight [N, K] that is int8, and no other, has scales [N], and is stored as INT8."""
    if weight.dtype is not torch.int8:
        if scales is not None:
            raise ValueError(f"a weight of {weight.dtype} has no scales")
    elif stored not in (WeightFormat.AS_GIVEN, WeightFormat.INT8):
        raise ValueError(f"an int8 weight is multiplied as int8, not as {stored.value}")
    elif scales is None or scales.shape != weight.shape[:1]:
        found = "none" if scales is None else f"shape {list(scales.shape)}"
        raise ValueError(f"an int8 weight needs scales of shape {list(weight.shape[:1])}, it has {found}")


class Operations(Protocol):
    """What a model's layers are written in: functions of flat rows, with rows in and rows out.

    Contracts (shapes, formulas, order) are in `kernels.reference` under the same names. Stateless: every result is a
    function of the arguments.
    """

    def embedding(self, token_ids: Tensor, weight: Tensor) -> Tensor: ...

    def take_rows(self, x: Tensor, indices: Tensor) -> Tensor: ...

    def linear(
        self, layer: Linear, x: Tensor, *, residual: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor: ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]: ...

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor: ...

    def rotate_and_write(
        self, query: Tensor, kv: tuple[Tensor, Tensor], rotation: Rotation, *, pages: Tensor, layer: int, slots: Tensor
    ) -> Tensor: ...

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
    ) -> Tensor: ...


Definition = Callable[[Operations, Batch, Tensor], tuple[Tensor, ...]]
"""A model in operations: from a step's batch and the pages [num_blocks, KVH, L, 2, BS, D] to one or two results.

It may shape, split and view what operations return, and nothing else: every number is an operation's.
"""


class Backend(Operations, Protocol):
    """What computes: the operations, what prepares for them, and what reads the logits that they lead to.

    Contracts of the last two are in `kernels.sampling` under the same names, of all others in `kernels.reference`.
    """

    @property
    def name(self) -> str:
        """For people: device and kind, such as `cpu (avx512)`."""

    @property
    def abi_version(self) -> int:
        """Grows when the bits of any result may have changed; part of the numerics digest."""

    @property
    def instruction_set(self) -> str:
        """Class of machine code that the bits depend on; part of the numerics digest."""

    def prepare_linear(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        stored: WeightFormat = WeightFormat.AS_GIVEN,
        scales: Tensor | None = None,
    ) -> Linear:
        """Takes weight [N, K] and bias [N] to where `Linear` wants them.

        A weight that is quantized already is int8 and comes with its `scales` [N]: an output's weights are its scale
        times its integers, which are multiplied as `WeightFormat.INT8` says, unchanged. Raises ValueError for integers
        without scales, scales without integers, another number of them, or integers to be stored in another format.
        """

    def prepare_head(self, weight: Tensor) -> Linear:
        """The layer of weight [N, K], which are floats, whose outputs are what tokens are drawn from.

        It is as `prepare_linear` makes it, but that a `background_step` may leave out what no draw depends on.
        """

    def prepare_gated_linear(
        self,
        gate: tuple[Tensor, Tensor | None],
        up: tuple[Tensor, Tensor | None],
        *,
        stored: WeightFormat = WeightFormat.AS_GIVEN,
        scales: tuple[Tensor, Tensor] | None = None,
    ) -> Linear:
        """The layer silu(gate(x)) up(x), from weight and bias of each; `scales` as in `prepare_linear`, one of each."""

    def rope_tables(self, rope: Rope, *, head_dim: int, num_positions: int) -> tuple[Tensor, Tensor]: ...

    @property
    def packing(self) -> Packing | None:
        """How prepared layers are kept; None where preparing them costs nothing."""

    def compile_step(self, definition: Definition) -> Callable[[Batch, Tensor], tuple[Tensor, ...]]:
        """Returns `definition` over this backend's operations, as one call where the backend has that.

        Bits, bytes written and exceptions are those of calling the operations one by one. One thread at a time may call
        what is returned: it keeps scratch memory, and its results may be overwritten by the next call.
        """

    def background_step(self, definition: Definition) -> "BackgroundStep | None":
        """Returns `definition` for steps beside the caller; None where the backend computes in its caller's calls."""

    def log_softmax(self, logits: Tensor) -> Tensor: ...

    def sample(self, logits: Tensor, draws: Sequence[TokenDraw]) -> list[int]: ...

    def score_tokens(self, logits: Tensor, rows: Tensor, targets: Tensor, count: int) -> TokenScores: ...


def select(device: str, *, threads: int = 1) -> Backend:
    """Returns the backend for `device`: `cpu`, the compiled kernels, or `cpu-reference`, the specification in torch.

    Never one for the other. `threads` is how many the compiled kernels may use; the reference uses torch's. Raises
    ValueError, naming what there is, for a device nothing computes on, and BackendUnavailableError, saying what to do,
    when the kernels are not built.
    """
    if device == "cpu":
        from kernels.cpu.backend import CpuBackend

        return CpuBackend(threads=threads)
    if device == "cpu-reference":
        from kernels.reference import ReferenceBackend

        return ReferenceBackend()
    raise ValueError(f"no backend computes on device {device!r}; supported: cpu, cpu-reference")
