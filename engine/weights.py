"""Weights from safetensors files, by memory map: every name, shape and type is checked before anything is allocated.

Tensors are copied, into aligned memory of our own: the map's alignment differs from file to file, and arithmetic
may follow alignment; and a file replaced under a running worker must not change its model.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.compressed_tensors import OwnDtype
from kvtransfer.layout import KVDtype
from staffetta.identity import ModelRefusedError, weight_names

TORCH_DTYPES: dict[KVDtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

_OWN_DTYPES: dict[OwnDtype, torch.dtype] = {"int8": torch.int8, "float32": torch.float32}
_FLOATS = ("F32", "BF16", "F16")
_INTEGERS = ("I8",)
_NO_OWN_DTYPES: Mapping[str, OwnDtype] = {}
# Buffers that older exporters wrote out; they are computed from the configuration.
_DERIVED_SUFFIXES = (".rotary_emb.inv_freq",)
_FIX = "use weights and config.json of the same model"


class StoredWeights(Mapping[str, Tensor]):
    """A model's tensors where they are stored, each read when it is asked for and kept by nobody but who asked.

    So a model can be packed part by part, without its weights ever being in memory twice. One thread at a time.
    """

    def __init__(
        self,
        directory: Path,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        dtype: KVDtype,
        own_dtypes: Mapping[str, OwnDtype] = _NO_OWN_DTYPES,
    ) -> None:
        """Opens the files of `directory` and checks that they hold exactly what `shapes` declares.

        Tensors are converted to `dtype`; those that `own_dtypes` names are converted to that instead; integers must be
        stored as such, and only they may be. Raises ModelNotFoundError for a missing file, ModelRefusedError, naming
        tensor and file, when the files hold anything else.
        """
        names = weight_names(directory)
        self._directory = directory
        self._places = _check(directory, names, shapes, own_dtypes)
        kept = {tensor: _OWN_DTYPES[own] for tensor, own in own_dtypes.items()}
        self._dtypes = {tensor: kept.get(tensor, TORCH_DTYPES[dtype]) for tensor in self._places}

    def __getitem__(self, name: str) -> Tensor:
        """Returns a tensor, contiguous, on the CPU, owned by the caller. Raises KeyError for one that is not there."""
        with safe_open(self._directory / self._places[name], framework="pt") as file:
            stored = file.get_tensor(name)
        return torch.empty(stored.shape, dtype=self._dtypes[name]).copy_(stored)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _check(
    directory: Path,
    names: tuple[str, ...],
    shapes: Mapping[str, tuple[int, ...]],
    own_dtypes: Mapping[str, OwnDtype],
) -> dict[str, str]:
    """Reads the headers alone; returns which file holds each declared tensor."""
    places: dict[str, str] = {}
    for name in names:
        try:
            with safe_open(directory / name, framework="pt") as file:
                headers = {tensor: file.get_slice(tensor) for tensor in file.keys()}  # noqa: SIM118 (not a mapping)
                found = {tensor: (tuple(h.get_shape()), h.get_dtype()) for tensor, h in headers.items()}
        except SafetensorError as error:
            raise ModelRefusedError(
                f"{name} cannot be read", why="it is not a whole safetensors file", fix=_FIX
            ) from error
        for tensor, (shape, stored) in found.items():
            if tensor.endswith(_DERIVED_SUFFIXES):
                continue
            if tensor not in shapes:
                raise ModelRefusedError(f"{name} holds {tensor}", why="config.json declares no such tensor", fix=_FIX)
            if tensor in places:
                raise ModelRefusedError(f"{name} holds {tensor}", why=f"so does {places[tensor]}", fix=_FIX)
            if shape != shapes[tensor]:
                why = f"config.json declares {list(shapes[tensor])}"
                raise ModelRefusedError(f"{name}: {tensor} has shape {list(shape)}", why=why, fix=_FIX)
            supported = _INTEGERS if own_dtypes.get(tensor) == "int8" else _FLOATS
            if stored not in supported:
                why = f"supported: {', '.join(supported)}"
                raise ModelRefusedError(f"{name}: {tensor} is stored as {stored}", why=why, fix=_FIX)
            places[tensor] = name
    missing = sorted(shapes.keys() - places.keys())
    if missing:
        what = f"the weights lack {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
        raise ModelRefusedError(what, why="config.json declares it", fix=_FIX)
    return places
