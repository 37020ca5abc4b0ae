"""Computes steps: slices in, tokens out, with keys and values written into a pool that other processes may be reading.

The runner decides nothing and remembers nothing between steps but the pool's bytes; a step that is run again writes the
same ones.
"""

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from math import prod
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import kernels.background
from engine.batch import lay_out
from engine.compressed_tensors import Compression, own_dtypes, stored_shapes
from engine.identity import numerics_digest
from engine.model_config import ModelConfig
from engine.models.llama import Llama, tensor_shapes
from engine.packed_weights import ModelSource, load_model
from engine.request import PromptToken, SampledToken
from engine.sampler import Target, sample, score, token_draws
from engine.step import BlockCopy, Following, SequenceSlice, SliceResult, StepInFlight
from engine.weights import TORCH_DTYPES, StoredWeights
from kernels.backend import Backend, BackendUnavailableError, WeightFormat, select
from kvtransfer.layout import KVDtype, KVLayout
from staffetta.cache_dir import CacheDirectory
from staffetta.digest_memo import remembered_digest
from staffetta.identity import ModelRefusedError

__all__ = ["BackendUnavailableError", "ModelRunner", "load_runner"]

log = logging.getLogger(__name__)

_SCORED_ROWS = 64


def load_runner(
    directory: Path,
    config: ModelConfig,
    layout: KVLayout,
    *,
    pool: memoryview,
    num_blocks: int,
    threads: int,
    device: str,
    quantization: Literal["none", "int8", "int8-weight", "int4"] = "none",
    cache: CacheDirectory | None = None,
) -> "ModelRunner":
    """Loads the weights of `directory` and returns a runner over `pool`, computing in the layout's dtype.

    With a `cache`, packed weights are mapped from there, and put there first where they are missing: then the layout's
    model digest must be that of `directory`.

    `quantization` makes integers of the layers' linear weights at load, as the `WeightFormat` of that name says. A
    checkpoint that is quantized already is computed as it is stored, and refused with any other `quantization`.
    Computes on `threads` threads, and sets the process's number for torch's own operations to that. Raises
    ModelRefusedError or ModelNotFoundError for the directory, ValueError for a device nothing computes on or a pool of
    the wrong size.
    """
    if threads < 1:
        raise ValueError(f"threads is {threads}, needs at least 1")
    if config.compression is not Compression.NONE and quantization != "none":
        raise ModelRefusedError(
            f"the weights are {config.compression.value} already",
            why=f"quantization {quantization} is for weights that are not",
            fix="--quantization none",
        )
    torch.set_num_threads(threads)
    shapes, dtype = tensor_shapes(config), layout.groups[0].dtype
    backend, stored = select(device, threads=threads), WeightFormat(quantization)

    def read_weights() -> StoredWeights:
        own = own_dtypes(shapes, config.compression)
        return StoredWeights(directory, stored_shapes(shapes, config.compression), dtype=dtype, own_dtypes=own)

    source = ModelSource(
        config=config,
        read_weights=read_weights,
        read_digest=lambda: remembered_digest(directory, cache),
        backend=backend,
        dtype=dtype,
        layers_stored=stored,
        model_digest=layout.model_digest,
        numerics_digest=_numerics_digest(config, backend, dtype=dtype, layers_stored=stored),
    )
    model = load_model(source, cache)
    return ModelRunner(config, model, backend, layout=layout, pool=pool, num_blocks=num_blocks, layers_stored=stored)


def _numerics_digest(config: ModelConfig, backend: Backend, *, dtype: KVDtype, layers_stored: WeightFormat) -> str:
    # Integers are multiplied alike, whoever made them.
    multiplied = WeightFormat.INT8 if config.compression is Compression.W8A8 else layers_stored
    return numerics_digest(config, backend, dtype=dtype, kv_dtype=dtype, quantization=multiplied)


class ModelRunner:
    """The `engine.step.Runner` that has a model. Engine thread only, construction excepted.

    `num_parameters` counts the model's weights, `numerics_digest` names the arithmetic, `backend_name` is for people.
    """

    def __init__(
        self,
        config: ModelConfig,
        model: Llama,
        backend: Backend,
        *,
        layout: KVLayout,
        pool: memoryview,
        num_blocks: int,
        layers_stored: WeightFormat = WeightFormat.AS_GIVEN,
    ) -> None:
        """Takes a `model` of `config` on `backend`, of the layout's dtype, whose layers are `layers_stored`.

        `pool` is writable memory of num_blocks x layout.page_bytes bytes; it is used in place and kept until the runner
        is gone. Raises ValueError when layout, model or pool do not fit the configuration.
        """
        (group,) = layout.groups
        expected = config.kv_layout(block_size=group.block_size, dtype=group.dtype, model_digest=layout.model_digest)
        if layout != expected:
            raise ValueError(f"layout is {layout}, the model needs {expected}")
        if pool.readonly or pool.nbytes != num_blocks * layout.page_bytes:
            raise ValueError(
                f"pool has {pool.nbytes} bytes (read-only: {pool.readonly}), "
                f"needs {num_blocks} writable pages of {layout.page_bytes}"
            )
        dtype = TORCH_DTYPES[group.dtype]
        if model.dtype != dtype:
            raise ValueError(f"weights are {model.dtype}, the layout is {group.dtype}")
        self.num_parameters = sum(prod(shape) for shape in tensor_shapes(config).values())
        self.numerics_digest = _numerics_digest(config, backend, dtype=group.dtype, layers_stored=layers_stored)
        self.backend_name = backend.name
        self._backend = backend
        self._model = model
        self._compute = backend.compile_step(model.forward)
        self._background = backend.background_step(model.forward)
        self._can_begin = self._background is not None
        self._block_size = group.block_size
        # [num_blocks, num_kv_heads, num_layers, 2, block_size, head_dim]; the pool's own bytes
        self._pages = torch.frombuffer(pool, dtype=dtype).view(num_blocks, *group.shape)

    def run(self, slices: tuple[SequenceSlice, ...]) -> list[SliceResult]:
        """Computes one step, as `engine.step.Runner` says.

        Blocks are copied before anything is computed. Raises ValueError or IndexError for a slice outside the model's
        vocabulary, positions or pool, ArithmeticError for logits that are not finite; then some of the step's keys and
        values may be written, and running it again is safe.
        """
        if not slices:
            return []
        batch = lay_out(slices, block_size=self._block_size)
        if copies := [part.copy for part in slices if part.copy is not None]:
            self._copy_blocks(copies)
        logits, scored = self._compute(batch, self._pages)
        draws = [part.draw for part in slices if part.draw is not None]
        tokens = iter(sample(logits, draws, self._backend))
        prompt_tokens = self._score(scored, [target for part in slices for target in _targets(part)])
        return [
            SliceResult(
                () if part.draw is None else next(tokens),
                () if part.score is None else tuple(islice(prompt_tokens, len(part.score.targets))),
            )
            for part in slices
        ]

    @property
    def can_begin(self) -> bool:
        """Whether steps can be begun: not on a backend that computes in calls, nor without a thread for them."""
        return self._can_begin

    def begin(self, slices: tuple[SequenceSlice, ...], *, follows: Following | None = None) -> StepInFlight | None:
        """Begins a step that only generates, as `engine.step.Runner` says.

        The first time that no thread can be started for it is the last: it is logged.
        """
        if self._background is None or not self._can_begin:
            return None
        batch = lay_out(slices, block_size=self._block_size)
        draws = [part.draw for part in slices if part.draw is not None]
        source = None
        if follows is not None:
            if not isinstance(follows.step, _ModelStep):
                raise TypeError(f"{follows.step!r} is no step of a model")
            source = kernels.background.Following(follows.step.computing, follows.slices)
        try:
            computing = self._background.begin(batch, self._pages, token_draws(draws), follows=source)
        except kernels.background.CannotBeginError as error:
            self._can_begin = False
            log.warning("no step is begun ahead from now on: %s", error)
            return None
        return _ModelStep(computing, [draw.output_index for draw in draws])

    def hold(self) -> None:
        """No step that follows another and is begun before `go_on` is computed, unless it is under way. Any thread."""
        if self._background is not None:
            self._background.hold()

    def go_on(self) -> None:
        """Ends `hold`, for steps that are begun from now on."""
        if self._background is not None:
            self._background.go_on()

    def _copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copies whole pages, all layers. Raises IndexError for a block outside the pool; then nothing is written."""
        for block_id in (block_id for copy in copies for block_id in copy):
            if not 0 <= block_id < len(self._pages):
                raise IndexError(f"block {block_id} to copy is outside the pool of {len(self._pages)}")
        for source, destination in copies:
            self._pages[destination].copy_(self._pages[source])

    def _score(self, hidden: Tensor, targets: Sequence[Target]) -> Iterator[PromptToken]:
        """Scores a prompt's tokens, few rows at a time: their logits are the largest tensor of a step.

        hidden: [len(targets), hidden_size].
        """
        for begin in range(0, len(targets), _SCORED_ROWS):
            tile = slice(begin, begin + _SCORED_ROWS)
            yield from score(self._model.logits(hidden[tile]), targets[tile], self._backend)


class _ModelStep:
    """A step of a model that was begun: its tokens as the engine wants them."""

    def __init__(self, computing: kernels.background.StepInFlight, output_indices: list[int]) -> None:
        self.computing = computing
        self._output_indices = output_indices

    @property
    def is_refused(self) -> bool:
        """Whether it is not computed when its turn comes, or was not."""
        return self.computing.is_refused

    def finish(self) -> list[SliceResult | None] | None:
        """Returns the results, or None."""
        token_ids = self.computing.finish()
        if token_ids is None:
            return None
        return [
            None if token_id < 0 else SliceResult((SampledToken(output_index, token_id),))
            for output_index, token_id in zip(self._output_indices, token_ids, strict=True)
        ]

    def discard(self) -> None:
        """Returns when nothing computes it any more."""
        self.computing.discard()


def _targets(part: SequenceSlice) -> list[Target]:
    """What a slice's rows are to be scored against."""
    if part.score is None:
        return []
    alternatives = part.score.num_alternatives
    return [Target(part.start + i + 1, token_id, alternatives) for i, token_id in enumerate(part.score.targets)]
