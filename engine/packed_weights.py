"""A model's weights as its backend packs them: prepared once, kept on disk, mapped by every process that serves it.

Prefill and decode on one host then hold one copy in memory, and a later start packs nothing. What cannot be kept is
prepared in this process's own memory, and the log says so; a file that is not whole is made again, never believed.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

from torch import Tensor

from engine.model_config import ModelConfig
from engine.models.llama import Llama, plain_tensors, prepare_linears
from engine.tensor_file import KEY_BYTES, TensorFileError, map_tensors, write_tensors
from kernels.backend import Backend, Packing, WeightFormat
from kvtransfer.layout import KVDtype
from staffetta.cache_dir import CacheDirectory

_WAIT_S = 120.0
"""How long a process waits for another that is packing the same weights, before it packs them itself."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A model to be loaded, and what its weights are to become.

    `read_weights` opens them, as `Llama` names them. `read_digest` is the directory's digest as it is when asked for.
    """

    config: ModelConfig
    read_weights: Callable[[], Mapping[str, Tensor]]
    read_digest: Callable[[], str]
    backend: Backend
    dtype: KVDtype
    layers_stored: WeightFormat
    model_digest: str
    numerics_digest: str


def load_model(source: ModelSource, cache: CacheDirectory | None) -> Llama:
    """The model, over mapped weights where `cache` and the backend allow that. Raises what `read_weights` raises."""
    packing = source.backend.packing
    if cache is not None and packing is not None:
        try:
            return _Kept(source, packing, cache).load()
        except OSError as error:
            log.warning("packed weights are not kept on disk (%s): this process has its own copy in memory", error)
    return Llama.from_weights(source.config, source.read_weights(), source.backend, layers_stored=source.layers_stored)


class _Kept:
    """A model's packed weights in a cache directory."""

    def __init__(self, source: ModelSource, packing: Packing, cache: CacheDirectory) -> None:
        self._source = source
        self._packing = packing
        self._cache = cache
        # Another version of the same weights takes the place of an older one: versions must not fill the disk.
        same = source.model_digest, source.backend.name, source.dtype, source.layers_stored.value
        self._name = f"{_digest(*same, num_bytes=16).hex()}.weights"
        self._key = _digest(source.model_digest, source.numerics_digest, packing.version, num_bytes=KEY_BYTES)

    def load(self) -> Llama:
        """Maps the file, or makes it first. Raises OSError when it cannot be made."""
        with suppress(TensorFileError):  # looked at again, and told, in turn
            if (model := self._map()) is not None:
                return model
        with self._cache.turn(self._name, wait_s=_WAIT_S):
            try:
                if (model := self._map()) is not None:
                    return model  # whoever had the turn before has made it
            except TensorFileError as error:
                log.warning("packed weights %s are not used and packed again: %s", self._path, error)
            return self._make()

    @property
    def _path(self) -> str:
        return str(self._cache.path / self._name)

    def _map(self) -> Llama | None:
        """The model over the file, None when there is none. Raises TensorFileError for one that is not believed."""
        started = time.monotonic()
        file = self._cache.open(self._name)
        if file is None:
            return None
        with file:
            tensors = map_tensors(file, self._key)
        log.info("weights mapped in %.1f s: %s", time.monotonic() - started, self._path)
        return self._assemble(tensors)

    def _make(self) -> Llama:
        started = time.monotonic()
        with self._cache.replace(self._name) as file:
            write_tensors(file, self._key, self._pack())
            if self._source.read_digest() != self._source.model_digest:
                raise OSError("the model's files changed while they were read")
            tensors = map_tensors(file, self._key)
        log.info("weights packed in %.1f s: %s", time.monotonic() - started, self._path)
        return self._assemble(tensors)

    def _pack(self) -> Iterator[tuple[str, Tensor]]:
        """All that the model is made of, one part in memory at a time."""
        source = self._source
        weights = source.read_weights()
        for name in plain_tensors(source.config):
            yield name, weights[name]
        linears = prepare_linears(source.config, weights, source.backend, layers_stored=source.layers_stored)
        for name, layer in linears:
            for part, tensor in self._packing.tensors(layer).items():
                yield f"{name}/{part}", tensor

    def _assemble(self, tensors: Mapping[str, Tensor]) -> Llama:
        """The model over what `_pack` has made: names are right where the key is."""
        layers: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            layer, slash, part = name.rpartition("/")
            if slash:
                layers.setdefault(layer, {})[part] = tensor
        linears = {name: self._packing.restore(parts) for name, parts in layers.items()}
        return Llama(self._source.config, tensors, linears, self._source.backend)


def _digest(*facts: str, num_bytes: int) -> bytes:
    return hashlib.blake2b("\n".join(facts).encode(), digest_size=num_bytes).digest()
