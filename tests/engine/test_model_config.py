"""Reading Hugging Face configurations: what is understood, and what is refused by name."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from engine.model_config import ModelConfig, resolve_dtype
from kernels.rope import LinearScaling, Llama3Scaling, Rope
from kvtransfer.layout import KVGroup, KVLayout
from staffetta.exits import ExitCode, ModelNotFoundError
from staffetta.identity import ModelRefusedError
from tests.engine.model_directory import make_config_directory

LLAMA3_FIELDS = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA3 = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)


def read(path: Path, **overrides: Any) -> ModelConfig:
    return ModelConfig.from_directory(make_config_directory(path / "model", **overrides))


def test_every_field_is_read(tmp_path: Path) -> None:
    assert read(tmp_path, attention_bias=True, rope_theta=5e5) == ModelConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_layers=3,
        num_heads=6,
        num_kv_heads=2,
        head_dim=8,
        rms_norm_eps=1e-5,
        rope=Rope(5e5),
        max_position_embeddings=256,
        attention_bias=True,
        mlp_bias=False,
        tie_word_embeddings=False,
        eos_token_ids=(2,),
    )


def test_head_dim_and_kv_heads_have_the_usual_defaults(tmp_path: Path) -> None:
    assert read(tmp_path, num_key_value_heads=None).num_kv_heads == 6
    assert read(tmp_path, head_dim=32).head_dim == 32
    assert read(tmp_path, head_dim=16).attention_scale == 0.25


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, Rope(10_000.0)),
        ({"rope_theta": 7.0, "rope_scaling": {"rope_type": "default"}}, Rope(7.0)),
        ({"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2}}, Rope(7.0, LinearScaling(2.0))),
        ({"rope_theta": 7.0, "rope_scaling": LLAMA3_FIELDS}, Rope(7.0, LLAMA3)),
        ({"rope_parameters": LLAMA3_FIELDS | {"rope_theta": 9.0}}, Rope(9.0, LLAMA3)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 9.0}, "rope_theta": 7.0}, Rope(9.0)),
    ],
)
def test_old_and_new_rope_fields_say_the_same(tmp_path: Path, fields: dict[str, Any], expected: Rope) -> None:
    assert read(tmp_path, **fields).rope == expected


def test_what_transformers_writes_is_read(tmp_path: Path) -> None:
    peer = LlamaConfig(architectures=["LlamaForCausalLM"], rope_parameters=LLAMA3_FIELDS | {"rope_theta": 5e5})
    peer.save_pretrained(tmp_path)
    config = ModelConfig.from_directory(tmp_path)
    assert (config.rope, config.head_dim, config.num_layers) == (Rope(5e5, LLAMA3), 128, 32)


def test_the_embedded_model_is_read() -> None:
    config = ModelConfig.from_directory(Path(__file__).parents[2] / "demo" / "model")
    assert config.eos_token_ids == (2,)


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"architectures": ["MistralForCausalLM"]}, "architectures is ['MistralForCausalLM']", "['LlamaForCausalLM']"),
    ({"architectures": None}, "architectures is None", "['LlamaForCausalLM']"),
    ({"model_type": "gpt2"}, "model_type is 'gpt2'", "'llama'"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'", "'silu'"),
    ({"quantization_config": {"bits": 4}}, "quant_method is None", "'compressed-tensors'"),
    ({"sliding_window": 128}, "sliding_window is 128", "may change results"),
    ({"hidden_size": None}, "hidden_size is None", "whole numbers from 1 to"),
    ({"hidden_size": 48.0}, "hidden_size is 48.0", "whole numbers"),
    ({"hidden_size": True}, "hidden_size is True", "whole numbers"),
    ({"hidden_size": 50}, "head_dim is None", "hidden_size 50 is no multiple of num_attention_heads 6"),
    ({"head_dim": 7}, "head_dim is 7", "even"),
    ({"num_key_value_heads": 4}, "num_key_value_heads is 4", "divide num_attention_heads 6"),
    ({"num_key_value_heads": 12}, "num_key_value_heads is 12", "from 1 to 6"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0", "from 1 to"),
    ({"vocab_size": 2**40}, "vocab_size is 1099511627776", "from 1 to"),
    ({"rms_norm_eps": 0}, "rms_norm_eps is 0", "numbers from 1e-12"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan", "numbers from 1e-12"),
    ({"rope_theta": True}, "rope_theta is True", "numbers from 1"),
    ({"attention_bias": 1}, "attention_bias is 1", "true, false"),
    ({"mlp_bias": "no"}, "mlp_bias is 'no'", "true, false"),
    ({"eos_token_id": 97}, "eos_token_id is 97", "below vocab_size 97"),
    ({"eos_token_id": [2, -1]}, "eos_token_id is [2, -1]", "below vocab_size 97"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'", "default, linear, llama3"),
    ({"rope_scaling": {"type": "dynamic"}}, "type is 'dynamic'", "default, linear, llama3"),
    ({"rope_scaling": {"type": ["linear"]}}, "type is ['linear']", "default, linear, llama3"),
    ({"rope_scaling": {"type": "linear"}}, "factor is None", "numbers from 1"),
    ({"rope_scaling": {"type": "linear", "factor": 2, "beta": 1}}, "beta is 1", "'linear' has no such field"),
    ({"rope_scaling": 3}, "rope_scaling is 3", "an object, or null"),
    ({"rope_scaling": LLAMA3_FIELDS | {"high_freq_factor": 1.0}}, "high_freq_factor is 1.0", "above low_freq_factor 1"),
    ({"rope_parameters": LLAMA3_FIELDS, "rope_scaling": LLAMA3_FIELDS}, "rope_scaling is {", "keep one of them"),
]


@pytest.mark.parametrize(("fields", "what", "why"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_not_computed_exactly_is_refused_by_name(
    tmp_path: Path, fields: dict[str, Any], what: str, why: str
) -> None:
    with pytest.raises(ModelRefusedError) as raised:
        read(tmp_path, **fields)
    assert what in raised.value.what
    assert raised.value.what.startswith("config.json: ")
    assert why in raised.value.why
    assert raised.value.exit_code == ExitCode.MODEL_NOT_FOUND


def test_unknown_fields_that_are_null_or_false_are_harmless(tmp_path: Path) -> None:
    directory = make_config_directory(tmp_path / "model", use_sliding_window=False)
    fields = json.loads((directory / "config.json").read_text()) | {"quantization_config": None}
    (directory / "config.json").write_text(json.dumps(fields))
    assert ModelConfig.from_directory(directory).num_layers == 3


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "config.json cannot be read"),
        (b"\xff\xfe", "config.json cannot be read"),
        (b"[" * 100_000, "config.json cannot be read"),
        (b"[]", "config.json holds no fields"),
        (b" " * (2**23 + 1), "config.json is too large"),
    ],
    ids=["empty", "no-text", "deep", "list", "large"],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelRefusedError, match=what):
        ModelConfig.from_directory(tmp_path)


def test_a_directory_without_configuration_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"has no config\.json"):
        ModelConfig.from_directory(tmp_path)


def test_generation_config_goes_before_config_in_naming_end_tokens(tmp_path: Path) -> None:
    directory = make_config_directory(tmp_path / "model")
    path = directory / "generation_config.json"
    path.write_text('{"eos_token_id": [5, 7, 5]}')
    assert ModelConfig.from_directory(directory).eos_token_ids == (5, 7)
    path.write_text("{}")
    assert ModelConfig.from_directory(directory).eos_token_ids == (2,)


def test_kv_layout_has_one_group_of_all_layers(tmp_path: Path) -> None:
    layout = read(tmp_path).kv_layout(block_size=16, dtype="bfloat16", model_digest="d")
    group = KVGroup(kind="full", num_layers=3, num_kv_heads=2, head_dim=8, block_size=16, dtype="bfloat16")
    assert layout == KVLayout("d", (group,))
    assert layout.page_bytes == 3 * 2 * 8 * 16 * 2 * 2


@pytest.mark.parametrize("block_size", [0, -16, 1025])
def test_kv_layout_refuses_absurd_block_sizes(tmp_path: Path, block_size: int) -> None:
    with pytest.raises(ValueError, match=f"block_size is {block_size}"):
        read(tmp_path).kv_layout(block_size=block_size, dtype="float32", model_digest="d")


def test_auto_is_float32_on_cpu() -> None:
    assert [resolve_dtype(dtype) for dtype in ("auto", "float32", "bfloat16")] == ["float32", "float32", "bfloat16"]


def test_reading_a_configuration_imports_no_torch() -> None:
    script = "import sys, engine.model_config; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
