"""The operations a model is written in, and the choice of who computes them.

`reference` is the specification of the values and states every operation's full contract; other backends agree with it
within tolerance, and with themselves as their own docstrings promise. Choosing one happens here and nowhere else;
nothing is loaded or built until it is chosen.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kernels.rope import Rope


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


class Backend(Protocol):
    """What computes. Stateless: every call's result is a function of its arguments.

    Contracts of the operations (shapes, formulas, order) are in `kernels.reference` under the same names.
    """

    @property
    def name(self) -> str:
        """For people: device and kind, such as `cpu (reference)`."""

    @property
    def abi_version(self) -> int:
        """Grows when the bits of any result may have changed; part of the numerics digest."""

    @property
    def instruction_set(self) -> str:
        """Class of machine code that the bits depend on; part of the numerics digest."""

    def embedding(self, token_ids: Tensor, weight: Tensor) -> Tensor: ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor: ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]: ...

    def rope_tables(self, rope: Rope, *, head_dim: int, num_positions: int) -> tuple[Tensor, Tensor]: ...

    def apply_rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor: ...

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor: ...

    def write_kv(self, keys: Tensor, values: Tensor, pages: Tensor, *, layer: int, slots: Tensor) -> None: ...

    def paged_attention(self, query: Tensor, pages: Tensor, spans: Spans, *, layer: int, scale: float) -> Tensor: ...

    def log_softmax(self, logits: Tensor) -> Tensor: ...


def select(device: str) -> Backend:
    """Returns the backend for `device`. Raises ValueError, naming what there is, for a device nothing computes on."""
    if device == "cpu":
        from kernels.reference import ReferenceBackend

        return ReferenceBackend()
    raise ValueError(f"no backend computes on device {device!r}; supported: cpu")
