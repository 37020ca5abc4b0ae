"""Loading safetensors: one file, shards, conversions, and everything that is refused before memory is taken."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.model_config import ModelConfig
from engine.models.llama import tensor_shapes
from engine.weights import StoredWeights
from kvtransfer.layout import KVDtype
from staffetta.exits import ModelNotFoundError
from staffetta.identity import INDEX_NAME, ModelRefusedError
from tests.engine.model_directory import make_config_directory, make_weights

NORM = "model.norm.weight"
Q = "model.layers.1.self_attn.q_proj.weight"


def load(directory: Path, dtype: KVDtype = "float32") -> dict[str, Tensor]:
    return dict(StoredWeights(directory, tensor_shapes(ModelConfig.from_directory(directory)), dtype=dtype))


def make_shards(directory: Path, weights: dict[str, Tensor], places: dict[str, str]) -> None:
    """Writes each tensor into the file that `places` names, and the index over them."""
    for shard in set(places.values()):
        save_file({name: weights[name] for name in weights if places[name] == shard}, directory / shard)
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return make_config_directory(tmp_path / "model")


def test_a_single_file_is_read_bit_for_bit(directory: Path) -> None:
    weights = make_weights(directory)
    save_file(weights, directory / "model.safetensors")
    loaded = load(directory)
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_shards_are_read_as_the_single_file(directory: Path) -> None:
    weights = make_weights(directory)
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    make_shards(directory, weights, {name: shards[i % 3] for i, name in enumerate(weights)})
    loaded = load(directory)
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    assert len(loaded) == len(weights)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dtype", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_stored_types_are_converted(
    directory: Path, stored: torch.dtype, dtype: KVDtype, expected: torch.dtype
) -> None:
    weights = {name: tensor.to(stored) for name, tensor in make_weights(directory).items()}
    save_file(weights, directory / "model.safetensors")
    loaded = load(directory, dtype)
    assert {tensor.dtype for tensor in loaded.values()} == {expected}
    assert torch.equal(loaded[Q], weights[Q].to(expected))


def test_loaded_weights_are_aligned_and_survive_the_file(directory: Path) -> None:
    weights = make_weights(directory)
    save_file(weights, directory / "model.safetensors")
    loaded = load(directory)
    with (directory / "model.safetensors").open("r+b") as file:
        file.write(bytes((directory / "model.safetensors").stat().st_size))
    assert torch.equal(loaded[Q], weights[Q])
    assert all(tensor.data_ptr() % 64 == 0 for tensor in loaded.values())


def test_rotary_buffers_of_older_exporters_are_not_weights(directory: Path) -> None:
    weights = make_weights(directory)
    save_file(
        weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, directory / "model.safetensors"
    )
    assert load(directory).keys() == weights.keys()


def drop(weights: dict[str, Tensor]) -> None:
    del weights[NORM], weights[Q]


def add(weights: dict[str, Tensor]) -> None:
    weights["model.layers.3.input_layernorm.weight"] = torch.ones(48)


def reshape(weights: dict[str, Tensor]) -> None:
    weights[Q] = weights[Q].T.contiguous().view(24, 96)


def widen(weights: dict[str, Tensor]) -> None:
    weights[NORM] = weights[NORM].double()


def quantize(weights: dict[str, Tensor]) -> None:
    weights[Q] = weights[Q].to(torch.int8)


BAD_WEIGHTS: list[tuple[Callable[[dict[str, Tensor]], None], str, str]] = [
    (drop, f"the weights lack {Q} and 1 more", "config.json declares it"),
    (add, "holds model.layers.3.input_layernorm.weight", "declares no such tensor"),
    (reshape, f"model.safetensors: {Q} has shape [24, 96]", "config.json declares [48, 48]"),
    (widen, f"{NORM} is stored as F64", "F32, BF16, F16"),
    (quantize, f"{Q} is stored as I8", "F32, BF16, F16"),
]


@pytest.mark.parametrize(("change", "what", "why"), BAD_WEIGHTS, ids=lambda value: getattr(value, "__name__", ""))
def test_weights_that_are_not_as_declared_are_refused_by_name(
    directory: Path, change: Callable[[dict[str, Tensor]], None], what: str, why: str
) -> None:
    weights = make_weights(directory)
    change(weights)
    save_file(weights, directory / "model.safetensors")
    with pytest.raises(ModelRefusedError) as raised:
        load(directory)
    assert what in raised.value.what
    assert why in raised.value.why


def test_a_tensor_in_two_shards_is_refused(directory: Path) -> None:
    weights = make_weights(directory)
    make_shards(directory, weights, dict.fromkeys(weights, "a.safetensors") | {NORM: "b.safetensors"})
    save_file(weights, directory / "a.safetensors")
    with pytest.raises(ModelRefusedError, match=rf"b\.safetensors holds {NORM}") as raised:
        load(directory)
    assert raised.value.why == "so does a.safetensors"


HEADER = json.dumps({NORM: {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00" * 7, b"\xff" * 64, struct.pack("<Q", len(HEADER)) + HEADER, struct.pack("<Q", 2) + b"[]"],
    ids=["empty", "short", "huge header", "tensor beyond the file", "no header"],
)
def test_a_broken_file_is_refused(directory: Path, content: bytes) -> None:
    (directory / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelRefusedError, match=r"model\.safetensors cannot be read"):
        load(directory)


@pytest.mark.parametrize("cut", [1, 1000])
def test_a_truncated_file_is_refused(directory: Path, cut: int) -> None:
    save_file(make_weights(directory), directory / "model.safetensors")
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(content[:-cut])
    with pytest.raises(ModelRefusedError, match="cannot be read"):
        load(directory)


def test_a_missing_file_is_named(directory: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"has no model\.safetensors"):
        load(directory)
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": {NORM: "gone.safetensors"}}))
    with pytest.raises(ModelNotFoundError, match=r"has no gone\.safetensors"):
        load(directory)


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "weights.bin",
        ".safetensors",
        "",
        3,
        None,
        "a\n.safetensors",
        "a.safetensors\n",
        "a.safetensors/b",
    ],
)
def test_a_shard_name_that_is_not_a_plain_file_name_is_refused(directory: Path, name: object) -> None:
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": {NORM: name}}))
    with pytest.raises(ModelRefusedError, match=f"places {NORM} in ") as raised:
        load(directory)
    assert raised.value.what.endswith(f" in {name!r}")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000])
def test_a_malformed_index_is_refused(directory: Path, content: str) -> None:
    (directory / INDEX_NAME).write_text(content)
    with pytest.raises(ModelRefusedError, match=INDEX_NAME):
        load(directory)
