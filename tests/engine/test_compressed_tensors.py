"""Quantized checkpoints: what of `quantization_config` is understood, and that integers are computed as stored."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bench.make_checkpoint import CheckpointFormat, config_fields
from bench.shapes import SHAPES
from engine.compressed_tensors import Compression, own_dtypes, parse_compression, stored_shapes
from engine.model_config import ModelConfig
from engine.runner import ModelRunner, load_runner
from engine.step import SliceResult
from kernels.reference import quantize_rows
from staffetta.identity import ModelRefusedError, model_digest
from staffetta.model_settings import Fields
from tests.engine.model_directory import (
    NUM_BLOCKS,
    make_config_directory,
    make_model_directory,
    make_sampling,
    make_slice,
    make_weights,
)

W8A8: dict[str, Any] = config_fields(SHAPES["tiny"], stored=CheckpointFormat.W8A8)["quantization_config"]
Q = "model.layers.1.self_attn.q_proj.weight"
PROMPT = [(7 * i * i + 3) % 97 for i in range(14)]


def parse(config: dict[str, Any] | None) -> Compression:
    return parse_compression(Fields("config.json", {"quantization_config": config}))


def changed(*path: str, value: object) -> dict[str, Any]:
    """A W8A8 configuration with one value replaced, or added."""
    config = copy.deepcopy(W8A8)
    *parents, name = path
    section = config
    for parent in parents:
        section = section[parent]
    section[name] = value
    return config


def test_without_a_configuration_nothing_is_compressed() -> None:
    assert parse(None) is Compression.NONE


def test_per_channel_int8_with_per_token_activations_is_understood() -> None:
    assert parse(W8A8) is Compression.W8A8


def test_what_only_tells_how_the_file_was_made_is_harmless() -> None:
    config = changed("config_groups", "group_0", "weights", "observer", value="minmax")
    config |= {"global_compression_ratio": 1.4, "version": "0.12.2", "sparsity_config": {}, "transform_config": {}}
    config["config_groups"]["group_0"]["weights"] |= {"observer_kwargs": {}, "group_size": None, "actorder": None}
    assert parse(config) is Compression.W8A8


REFUSED: list[tuple[dict[str, Any], str]] = [
    (changed("quant_method", value="gptq"), "quantization_config: quant_method is 'gptq'"),
    (changed("format", value="pack-quantized"), "format is 'pack-quantized'"),
    (changed("quantization_status", value="frozen"), "quantization_status is 'frozen'"),
    (changed("ignore", value=[]), "ignore is []"),
    (changed("ignore", value=["lm_head", "model.layers.0.mlp.up_proj"]), "ignore is ['lm_head', 'model"),
    (changed("kv_cache_scheme", value={"num_bits": 8}), "kv_cache_scheme is {'num_bits': 8}"),
    (changed("sparsity_config", value={"format": "sparse-24"}), "sparsity_config is {'format'"),
    (changed("config_groups", value=None), "config_groups is None"),
    (changed("config_groups", "group_1", value={}), "config_groups is {'group_0'"),
    (changed("config_groups", "group_0", value=3), "group_0 is 3"),
    (changed("config_groups", "group_0", "targets", value=["re:.*down_proj"]), "targets is ['re:.*down_proj']"),
    (changed("config_groups", "group_0", "output_activations", value={}), "output_activations is {}"),
    (changed("config_groups", "group_0", "weights", "num_bits", value=4), "group_0: weights: num_bits is 4"),
    (changed("config_groups", "group_0", "weights", "type", value="float"), "weights: type is 'float'"),
    (changed("config_groups", "group_0", "weights", "symmetric", value=False), "symmetric is False"),
    (changed("config_groups", "group_0", "weights", "strategy", value="group"), "strategy is 'group'"),
    (changed("config_groups", "group_0", "weights", "group_size", value=128), "group_size is 128"),
    (changed("config_groups", "group_0", "weights", "zero_point", value=1), "weights: zero_point is 1"),
    (changed("config_groups", "group_0", "input_activations", value=None), "input_activations is None"),
    (changed("config_groups", "group_0", "input_activations", "dynamic", value=False), "dynamic is False"),
    (changed("config_groups", "group_0", "input_activations", "strategy", value="tensor"), "strategy is 'tensor'"),
    (changed("rotation", value="hadamard"), "quantization_config: rotation is 'hadamard'"),
]


@pytest.mark.parametrize(("config", "what"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_would_be_computed_otherwise_is_refused_by_name(config: dict[str, Any], what: str) -> None:
    with pytest.raises(ModelRefusedError) as raised:
        parse(config)
    assert what in raised.value.what


def test_a_configuration_that_is_no_object_is_refused() -> None:
    with pytest.raises(ModelRefusedError, match="quantization_config is 8"):
        parse_compression(Fields("config.json", {"quantization_config": 8}))


def test_scales_are_declared_beside_the_layers_linear_weights_and_no_others() -> None:
    shapes = {"model.embed_tokens.weight": (97, 48), "model.norm.weight": (48,), Q: (80, 48), "x_proj.bias": (80,)}
    assert stored_shapes(shapes, Compression.NONE) == shapes
    assert own_dtypes(shapes, Compression.NONE) == {}
    assert stored_shapes(shapes, Compression.W8A8) == {**shapes, f"{Q}_scale": (80, 1)}
    assert own_dtypes(shapes, Compression.W8A8) == {Q: "int8", f"{Q}_scale": "float32"}


# Loading and computing


def quantized(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The layers' linear weights as integers and float32 scales, the others as they are."""
    stored = {}
    for name, weight in weights.items():
        if name.endswith("_proj.weight"):
            stored[name], scales = quantize_rows(weight)
            stored[f"{name}_scale"] = scales[:, None].contiguous()
        else:
            stored[name] = weight
    return stored


def make_quantized_directory(path: Path, **overrides: Any) -> Path:
    """The quantized twin of `make_model_directory`: the same random weights as integers."""
    plain = make_config_directory(path, **overrides)
    weights = quantized(make_weights(plain))
    make_config_directory(path, quantization_config=W8A8, **overrides)
    save_file(weights, path / "model.safetensors")
    return path


def make_runner(path: Path, *, device: str = "cpu", quantization: Any = "none") -> ModelRunner:
    config = ModelConfig.from_directory(path)
    layout = config.kv_layout(block_size=4, dtype="float32", model_digest=model_digest(path))
    pool = memoryview(bytearray(layout.page_bytes * NUM_BLOCKS))
    return load_runner(
        path, config, layout, pool=pool, num_blocks=NUM_BLOCKS, threads=1, device=device, quantization=quantization
    )


def first_token(runner: ModelRunner) -> SliceResult:
    sampling = make_sampling(num_logprobs=5)
    (result,) = runner.run((make_slice(PROMPT, start=0, blocks=[9, 4, 21, 2], sampling=sampling),))
    return result


@pytest.mark.parametrize("overrides", [{}, {"attention_bias": True, "mlp_bias": True, "intermediate_size": 76}])
def test_stored_integers_give_the_bits_of_the_same_integers_made_at_load(
    tmp_path: Path, overrides: dict[str, Any]
) -> None:
    plain = make_model_directory(tmp_path / "plain", **overrides)
    stored = make_quantized_directory(tmp_path / "stored", **overrides)
    at_load = make_runner(plain, quantization="int8")
    as_stored = make_runner(stored)
    assert first_token(as_stored) == first_token(at_load)
    assert as_stored.numerics_digest == at_load.numerics_digest
    assert as_stored.num_parameters == at_load.num_parameters


def test_stored_integers_are_computed_by_the_reference_too(tmp_path: Path) -> None:
    stored = make_quantized_directory(tmp_path / "stored")
    (ours,), (theirs,) = (first_token(make_runner(stored, device=each)).tokens for each in ("cpu", "cpu-reference"))
    assert ours.token_id == theirs.token_id
    assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)


def test_integers_are_not_quantized_again(tmp_path: Path) -> None:
    with pytest.raises(ModelRefusedError, match="the weights are w8a8 already") as raised:
        make_runner(make_quantized_directory(tmp_path / "stored"), quantization="int8")
    assert raised.value.fix == "--quantization none"


def drop_scale(weights: dict[str, Tensor]) -> None:
    del weights[f"{Q}_scale"]


def flatten_scale(weights: dict[str, Tensor]) -> None:
    weights[f"{Q}_scale"] = weights[f"{Q}_scale"].flatten()


def keep_float(weights: dict[str, Tensor]) -> None:
    weights[Q] = weights[Q].float()


def count_scales(weights: dict[str, Tensor]) -> None:
    weights[f"{Q}_scale"] = torch.ones_like(weights[f"{Q}_scale"], dtype=torch.int8)


@pytest.mark.parametrize(
    ("spoil", "what", "why"),
    [
        (drop_scale, f"the weights lack {Q}_scale", "config.json declares it"),
        (flatten_scale, f"{Q}_scale has shape [48]", "declares [48, 1]"),
        (keep_float, f"{Q} is stored as F32", "supported: I8"),
        (count_scales, f"{Q}_scale is stored as I8", "supported: F32, BF16, F16"),
    ],
)
def test_files_that_are_not_what_the_configuration_says_are_refused(
    tmp_path: Path, spoil: Callable[[dict[str, Tensor]], None], what: str, why: str
) -> None:
    directory = make_config_directory(tmp_path / "model")
    weights = quantized(make_weights(directory))
    make_config_directory(directory, quantization_config=W8A8)
    spoil(weights)
    save_file(weights, directory / "model.safetensors")
    with pytest.raises(ModelRefusedError) as raised:
        make_runner(directory)
    assert what in raised.value.what
    assert why in raised.value.why
