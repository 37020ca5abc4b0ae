"""Digests: what changes them, and what must not."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

import staffetta.identity
from engine.identity import numerics_digest
from engine.model_config import ModelConfig
from kernels.backend import select
from kernels.rope import LinearScaling, Rope
from staffetta.exits import ModelNotFoundError
from staffetta.identity import INDEX_NAME, ModelRefusedError, model_digest, weight_names
from tests.engine.model_directory import make_config_directory, make_model_directory, make_weights


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = make_model_directory(tmp_path / "model")
    (directory / "tokenizer.json").write_text("{}")
    return directory


def test_equal_contents_have_equal_digests_wherever_they_lie(directory: Path, tmp_path: Path) -> None:
    shutil.copytree(directory, tmp_path / "elsewhere")
    assert model_digest(directory) == model_digest(tmp_path / "elsewhere")
    assert len(bytes.fromhex(model_digest(directory))) == 32


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_one_changed_byte_changes_the_digest(directory: Path, name: str) -> None:
    before = model_digest(directory)
    content = bytearray((directory / name).read_bytes())
    content[len(content) // 2] ^= 1
    (directory / name).write_bytes(content)
    assert model_digest(directory) != before


def test_an_optional_file_counts_and_so_does_its_name(directory: Path) -> None:
    digests = {model_digest(directory)}
    for name in (
        "generation_config.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "special_tokens_map.json",
    ):
        (directory / name).write_text("{}")
        digests.add(model_digest(directory))
        (directory / name).unlink()
    assert len(digests) == 5


def test_files_of_no_meaning_do_not_count(directory: Path) -> None:
    before = model_digest(directory)
    (directory / "README.md").write_text("hello")
    (directory / "consolidated.safetensors").write_text("hello")
    assert model_digest(directory) == before


def test_content_that_moves_from_one_file_to_another_changes_the_digest(directory: Path) -> None:
    (directory / "tokenizer_config.json").write_text("[]")
    before = model_digest(directory)
    (directory / "tokenizer.json").write_text("[]")
    (directory / "tokenizer_config.json").write_text("{}")
    assert model_digest(directory) != before


def test_every_shard_counts(directory: Path) -> None:
    weights = make_weights(directory)
    names = ["a.safetensors", "b.safetensors"]
    places = {tensor: names[i % 2] for i, tensor in enumerate(weights)}
    for name in names:
        save_file({t: weights[t] for t in weights if places[t] == name}, directory / name)
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": places}))
    assert weight_names(directory) == ("a.safetensors", "b.safetensors")
    before = model_digest(directory)
    with (directory / "b.safetensors").open("ab") as file:
        file.write(b"x")
    assert model_digest(directory) != before


def test_a_directory_without_a_model_has_no_digest(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"has no config\.json"):
        model_digest(tmp_path / "nothing")
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match=r"has no model\.safetensors"):
        model_digest(directory)


def test_an_index_beyond_its_bound_is_refused_unread(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    assert weight_names(directory) == ("model.safetensors",)
    monkeypatch.setattr(staffetta.identity, "MAX_INDEX_BYTES", 10)
    with pytest.raises(ModelRefusedError, match="too large"):
        weight_names(directory)


def test_the_gateway_computes_the_digest_without_torch_or_engine(directory: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from staffetta.identity import model_digest; "
        "print(model_digest(Path(sys.argv[1])), {'torch', 'engine', 'numpy', 'kvtransfer'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", script, str(directory)]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == f"{model_digest(directory)} set()"


class OtherBackend:
    """The reference with another identity."""

    def __init__(self, **facts: Any) -> None:
        self._facts = facts

    def __getattr__(self, name: str) -> Any:
        return self._facts.get(name, getattr(select("cpu"), name))


def test_numerics_digest_follows_what_may_change_bits(tmp_path: Path) -> None:
    config = ModelConfig.from_directory(make_config_directory(tmp_path / "model"))
    backend = select("cpu")
    digests = [
        numerics_digest(config, backend, dtype="float32", kv_dtype="float32"),
        numerics_digest(config, backend, dtype="bfloat16", kv_dtype="float32"),
        numerics_digest(config, backend, dtype="float32", kv_dtype="bfloat16"),
        *(
            numerics_digest(config, OtherBackend(**facts), dtype="float32", kv_dtype="float32")
            for facts in ({"abi_version": 999}, {"instruction_set": "avx2"}, {"name": "cpu (compiled)"})
        ),
        *(
            numerics_digest(dataclasses.replace(config, **changes), backend, dtype="float32", kv_dtype="float32")
            for changes in (
                {"rope": Rope(5e5)},
                {"rope": Rope(1e4, LinearScaling(2.0))},
                {"head_dim": 16},
                {"rms_norm_eps": 1e-6},
            )
        ),
    ]
    assert len(set(digests)) == len(digests)


def test_numerics_digest_is_the_same_every_time_and_for_every_size_of_model(tmp_path: Path) -> None:
    config = ModelConfig.from_directory(make_config_directory(tmp_path / "model"))
    larger = dataclasses.replace(config, num_layers=9, vocab_size=5000, max_position_embeddings=4096)
    first = numerics_digest(config, select("cpu"), dtype="float32", kv_dtype="float32")
    assert numerics_digest(larger, select("cpu"), dtype="float32", kv_dtype="float32") == first
    assert len(bytes.fromhex(first)) == 16
