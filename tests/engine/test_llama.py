"""Logits and greedy continuations against transformers, in float32, on random tiny models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from engine.batch import lay_out
from engine.model_config import ModelConfig
from engine.models.llama import Llama, tensor_shapes
from engine.weights import StoredWeights
from kernels.backend import select
from tests.engine.model_directory import BLOCK_SIZE, make_model_directory, make_runner, make_sampling, make_slice

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS: dict[str, dict[str, Any]] = {
    "grouped-untied": {},
    "tied": {"tie_word_embeddings": True},
    "one-kv-head": {"num_key_value_heads": 1, "head_dim": 16},
    "all-kv-heads": {"num_key_value_heads": 6},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "llama3-old-style": {"rope_theta": 500.0, "rope_scaling": LLAMA3},
    "llama3-new-style": {"rope_parameters": {"rope_theta": 500.0} | LLAMA3},
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.5}},
}
PROMPT = [5, 90, 3, 3, 41, 17, 66, 8, 12, 54, 2]
NUM_STEPS = 36


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def all_logits(directory: Path, token_ids: list[int]) -> Tensor:
    """Our logits at every position: one slice per prefix end, each writing the next token's KV."""
    config = ModelConfig.from_directory(directory)
    backend = select("cpu")
    model = Llama.from_weights(config, StoredWeights(directory, tensor_shapes(config), dtype="float32"), backend)
    num_blocks = -(-len(token_ids) // BLOCK_SIZE)
    pages = torch.zeros(num_blocks, config.num_kv_heads, config.num_layers, 2, BLOCK_SIZE, config.head_dim)
    rows = []
    for end in range(1, len(token_ids) + 1):
        part = make_slice(
            token_ids[:end], start=end - 1, blocks=list(range(num_blocks)), sampling=make_sampling(), output_index=0
        )
        rows.append(model.forward(backend, lay_out((part,), block_size=BLOCK_SIZE), pages)[0])
    return torch.cat(rows)


def continuation(directory: Path, prompt: list[int], num_steps: int) -> list[int]:
    """Greedy tokens of a runner: one prefill, then decode steps."""
    runner = make_runner(directory)
    known, start = list(prompt), 0
    for index in range(num_steps):
        part = make_slice(known, start=start, blocks=list(range(40)), sampling=make_sampling(), output_index=index)
        ((token,),) = (result.tokens for result in runner.run((part,)))
        start = len(known)
        known.append(token.token_id)
    return known[len(prompt) :]


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_tokens_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    directory = make_model_directory(tmp_path / "model", **MODELS[name])
    peer = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    tokens = continuation(directory, PROMPT, NUM_STEPS)
    with torch.inference_mode():
        expected = peer(torch.tensor([PROMPT + tokens])).logits[0]
    torch.testing.assert_close(all_logits(directory, PROMPT + tokens), expected, rtol=0, atol=1e-4)
    assert tokens == expected.argmax(-1)[len(PROMPT) - 1 : -1].tolist()
    assert len(set(tokens)) > 4, "a continuation that repeats itself proves little"


def test_shapes_declare_exactly_the_tensors_of_a_checkpoint(tmp_path: Path) -> None:
    directory = make_model_directory(tmp_path / "model", attention_bias=True, mlp_bias=True, head_dim=16)
    peer = LlamaForCausalLM.from_pretrained(directory)
    expected = {name: tuple(tensor.shape) for name, tensor in peer.state_dict().items()}
    assert tensor_shapes(ModelConfig.from_directory(directory)) == expected


def test_tied_models_have_no_head_of_their_own(tmp_path: Path) -> None:
    directory = make_model_directory(tmp_path / "model", tie_word_embeddings=True)
    assert "lm_head.weight" not in tensor_shapes(ModelConfig.from_directory(directory))
