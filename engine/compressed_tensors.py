"""Checkpoints that are quantized already, in the form of compressed-tensors: which of them can be computed as they are.

One form: INT8 weights with a scale per output, activations quantized to INT8 token by token as they come, in all linear
layers but the head ("W8A8"). Its integers and scales go to the backend unchanged. Whatever else `quantization_config`
may say is refused by name: arithmetic that is not the file's would give other tokens. No torch.
"""

from collections.abc import Mapping
from enum import Enum
from typing import Final, Literal

from staffetta.model_settings import Fields


class Compression(Enum):
    """How a checkpoint's linear layers are stored."""

    NONE = "none"
    """Floating point, as everything else."""
    W8A8 = "w8a8"
    """int8, beside each weight a `…weight_scale` [outputs, 1]; the head, embedding, norms and biases are not."""


OwnDtype = Literal["int8", "float32"]
"""The types that tensors of a quantized checkpoint are kept in, whatever the model computes in."""

_Allowed = Mapping[str, tuple[object, ...]]
# A field that is not there counts as None. How scales were found, and how small the file became, changes no result.
_CONFIG: Final[_Allowed] = {
    "quant_method": ("compressed-tensors",),
    "format": ("int-quantized",),
    "quantization_status": ("compressed", None),
    "ignore": (["lm_head"],),
    "kv_cache_scheme": (None,),
    "sparsity_config": ({}, None),
    "transform_config": ({}, None),
}
_INERT_CONFIG: Final = frozenset({"config_groups", "global_compression_ratio", "version"})
_GROUP: Final[_Allowed] = {
    "targets": (["Linear"],),
    "output_activations": (None,),
    "format": ("int-quantized", None),
}
_INERT_GROUP: Final = frozenset({"weights", "input_activations"})
_INTEGERS: Final[_Allowed] = {
    "num_bits": (8,),
    "type": ("int",),
    "symmetric": (True,),
    "group_size": (None,),
    "block_structure": (None,),
}
_WEIGHTS: Final[_Allowed] = {**_INTEGERS, "strategy": ("channel",), "dynamic": (False, None), "actorder": (None,)}
_ACTIVATIONS: Final[_Allowed] = {**_INTEGERS, "strategy": ("token",), "dynamic": (True,), "actorder": (None,)}
_INERT_INTEGERS: Final = frozenset({"observer", "observer_kwargs", "scale_dtype", "zp_dtype"})

_LINEAR_SUFFIX: Final = "_proj.weight"


def parse_compression(config: Fields) -> Compression:
    """What config.json's `quantization_config` says. Raises ModelRefusedError for all but W8A8."""
    if config.values.get("quantization_config") is None:
        return Compression.NONE
    fields = _section(config, "quantization_config")
    _check(fields, _CONFIG, _INERT_CONFIG)
    groups = _section(fields, "config_groups")
    if len(groups.values) != 1:
        raise fields.refuse("config_groups", "supported: one group, for all linear layers")
    (name,) = groups.values
    group = _section(groups, name)
    _check(group, _GROUP, _INERT_GROUP)
    _check(_section(group, "weights"), _WEIGHTS, _INERT_INTEGERS)
    _check(_section(group, "input_activations"), _ACTIVATIONS, _INERT_INTEGERS)
    return Compression.W8A8


def stored_shapes(shapes: Mapping[str, tuple[int, ...]], compression: Compression) -> dict[str, tuple[int, ...]]:
    """Every tensor of the files, from every tensor of the model: with the scales, where there are any."""
    scales = {_scale_of(name): (shapes[name][0], 1) for name in _quantized(shapes, compression)}
    return {**shapes, **scales}


def own_dtypes(shapes: Mapping[str, tuple[int, ...]], compression: Compression) -> dict[str, OwnDtype]:
    """The tensors that are not kept in the model's dtype: integers as they are, scales in float32."""
    dtypes: dict[str, OwnDtype] = {}
    for name in _quantized(shapes, compression):
        dtypes[name] = "int8"
        dtypes[_scale_of(name)] = "float32"
    return dtypes


def _quantized(shapes: Mapping[str, tuple[int, ...]], compression: Compression) -> list[str]:
    return [name for name in shapes if compression is Compression.W8A8 and name.endswith(_LINEAR_SUFFIX)]


def _scale_of(name: str) -> str:
    return f"{name}_scale"


def _section(fields: Fields, name: str) -> Fields:
    value = fields.values.get(name)
    if not isinstance(value, dict):
        raise fields.refuse(name, "supported: an object")
    return Fields(f"{fields.file}: {name}", value)


def _check(fields: Fields, allowed: _Allowed, inert: frozenset[str]) -> None:
    """Raises ModelRefusedError for a value that is not allowed, and for a field that is neither known nor empty."""
    for name, values in allowed.items():
        if fields.values.get(name) not in values:
            raise fields.refuse(name, f"supported: {' or '.join(map(repr, values))}")
    for name, value in fields.values.items():
        if name not in allowed and name not in inert and value is not None:
            raise fields.refuse(name, "it is unknown here, and dropping it may change results")
