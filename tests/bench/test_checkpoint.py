"""Checkpoints of random weights: whole, repeatable, loadable by us and by others, and the same weights as integers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bench.make_checkpoint import CheckpointFormat, main, make_checkpoint
from bench.safetensors_stream import PlannedTensor, write_safetensors
from bench.shapes import SHAPES, ModelShape
from engine.compressed_tensors import Compression
from engine.model_config import ModelConfig
from engine.models.llama import tensor_shapes
from engine.runner import load_runner
from tests.engine.model_directory import make_sampling, make_slice

SMALL = ModelShape(
    vocab_size=600,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_positions=128,
)
UP = "model.layers.1.mlp.up_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


def make(path: Path, *, seed: int = 1, stored: CheckpointFormat = CheckpointFormat.BF16) -> Path:
    make_checkpoint(path, SMALL, seed=seed, stored=stored)
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def integers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("integers"), stored=CheckpointFormat.W8A8)


def weights_of(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_directory_is_what_the_shape_says(plain: Path) -> None:
    assert ModelConfig.from_directory(plain) == SMALL.model_config()
    assert {name: tuple(weight.shape) for name, weight in weights_of(plain).items()} == tensor_shapes(
        SMALL.model_config()
    )


def test_equal_arguments_give_equal_bytes_and_another_seed_other_weights(plain: Path, tmp_path: Path) -> None:
    again, other = make(tmp_path / "again"), make(tmp_path / "other", seed=2)
    assert bytes_of(again) == bytes_of(plain)
    changed = {name for name, content in bytes_of(other).items() if content != bytes_of(plain)[name]}
    assert changed == {"model.safetensors"}


def test_no_two_tensors_are_alike(plain: Path) -> None:
    weights = weights_of(plain)
    assert not torch.equal(weights["model.layers.0.mlp.up_proj.weight"], weights[UP])
    assert not torch.equal(weights["model.layers.1.mlp.gate_proj.weight"], weights[UP])


def test_weights_are_scaled_by_what_goes_in_and_by_how_often_they_are_added(plain: Path) -> None:
    weights = weights_of(plain)
    assert weights[UP].float().std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert weights[DOWN].float().std().item() == pytest.approx(2 * (96 * 2 * 2) ** -0.5, rel=0.05)
    embedding = weights["model.embed_tokens.weight"].float()
    assert embedding[262:].std().item() == pytest.approx(0.5 * 64**-0.5, rel=0.05)
    assert embedding[:262].std().item() == pytest.approx(0.01 * 0.5 * 64**-0.5, rel=0.05)
    assert torch.equal(weights["model.norm.weight"], torch.ones(64, dtype=torch.bfloat16))


def test_integers_are_the_same_weights_within_half_a_scale(plain: Path, integers: Path) -> None:
    expected, stored = weights_of(plain), weights_of(integers)
    assert stored[UP].dtype is torch.int8
    assert stored[UP].abs().max() == 127
    scale = stored[f"{UP}_scale"].float()
    assert scale.shape == (96, 1)
    assert ((stored[UP].float() * scale - expected[UP].float()).abs() <= 0.51 * scale).all()
    assert torch.equal(stored["model.embed_tokens.weight"], expected["model.embed_tokens.weight"])


@pytest.mark.parametrize("kind", ["plain", "integers"])
def test_the_engine_computes_finite_varied_tokens(kind: str, request: pytest.FixtureRequest) -> None:
    directory: Path = request.getfixturevalue(kind)
    config = ModelConfig.from_directory(directory)
    assert config.compression is (Compression.NONE if kind == "plain" else Compression.W8A8)
    layout = config.kv_layout(block_size=16, dtype="bfloat16", model_digest="0")
    pool = memoryview(bytearray(layout.page_bytes * 8))
    runner = load_runner(directory, config, layout, pool=pool, num_blocks=8, threads=1, device="cpu")
    tokens = [270, 280, 290]
    for position in range(20):
        start = 0 if position == 0 else len(tokens) - 1
        part = make_slice(tokens, start=start, blocks=[0, 1], sampling=make_sampling(), output_index=position)
        ((token,),) = (result.tokens for result in runner.run((part,)))
        tokens.append(token.token_id)
    assert len(set(tokens)) > 10
    assert min(tokens) >= 262  # words only


def test_transformers_reads_the_same_model(plain: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(plain)
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert rendered == "<|bos|><|user|>hi<|eos|><|assistant|>"
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == 2
    with torch.inference_mode():
        logits = model(torch.tensor([[270, 280, 290]])).logits
    assert logits.isfinite().all()
    assert 0.3 < logits[..., 262:].std() < 2


def test_the_command_takes_a_shape_and_overrules_its_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--num-layers", "1", "--vocab-size", "400"]
    assert main([str(tmp_path), "--shape", "tiny", *sizes, "--format", "w8a8"]) == 0
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["num_hidden_layers"], config["vocab_size"], config["hidden_size"]) == (1, 400, 128)
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert capsys.readouterr().out.endswith(" MB\n")


def test_a_directory_without_its_last_file_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path)

    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("bench.make_checkpoint.write_safetensors", fail)
    with pytest.raises(OSError, match="the disk is full"):
        make(tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_the_compared_shape_has_the_size_that_figures_were_published_for() -> None:
    shape = SHAPES["0.5b"]
    assert shape.layer_weights + shape.head_weights == 473_169_920
    assert shape.decode_bytes(layer_weight_bytes=2) == 946_339_840
    assert shape.decode_bytes(layer_weight_bytes=1) == 505_937_920
    assert shape.prefill_flops(1) == 2 * 473_169_920 + 28 * 4 * 2048
    assert SHAPES["llama-8b-layer"].linears == {
        "qkv": (4096, 6144),
        "o": (4096, 4096),
        "gate_up": (4096, 28_672),
        "down": (14_336, 4096),
    }


# The file format


def plan(name: str, *pieces: Tensor, shape: tuple[int, ...]) -> PlannedTensor:
    return PlannedTensor(name, torch.bfloat16, shape, lambda: iter(pieces))


def test_tensors_written_in_pieces_are_read_whole(tmp_path: Path) -> None:
    values = torch.randn(5, 3).bfloat16()
    path = tmp_path / "model.safetensors"
    write_safetensors(path, [plan("a", values[:2], values[2:], shape=(5, 3)), plan("b", values[0], shape=(3,))])
    read = load_file(path)
    assert list(read) == ["a", "b"]
    assert torch.equal(read["a"], values)
    assert torch.equal(read["b"], values[0])
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert (8 + header) % 64 == 0


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        (torch.ones(2, 3), "a is planned as torch.bfloat16, a piece is torch.float32"),
        (torch.ones(1, 3).bfloat16(), "a is planned with 12 bytes, its pieces have 6"),
    ],
)
def test_pieces_that_are_not_what_was_planned_leave_no_file(tmp_path: Path, piece: Tensor, message: str) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match=message):
        write_safetensors(path, [plan("a", piece, shape=(2, 3))])
    assert not path.exists()
