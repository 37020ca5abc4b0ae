"""The exported model is the trained one, loads everywhere, and a stopped run continues as if it had not stopped."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from demo import MODEL_DIR
from demo.llama import Llama, LlamaShape
from demo.recall import held_out_prompts, recall_accuracy
from demo.tokenizer import train_tokenizer
from demo.train import TrainConfig, Trainer

TINY = LlamaShape(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=48)
CONFIG = TrainConfig(steps=6, batch_tokens=192, skill_rows=1, warmup_steps=2, decay_steps=2)


def exported_in_training_form() -> Llama:
    model = Llama(LlamaShape())
    model.load_state_dict({name: value.float() for name, value in load_file(MODEL_DIR / "model.safetensors").items()})
    return model


def test_the_model_file_is_small() -> None:
    assert (MODEL_DIR / "model.safetensors").stat().st_size <= 8 << 20


def test_transformers_loads_every_weight_and_misses_none() -> None:
    loaded: Any = LlamaForCausalLM.from_pretrained(str(MODEL_DIR), output_loading_info=True)
    model, info = loaded
    assert not any(info.values())
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == train_tokenizer().token_to_id("<|end|>")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_the_training_form_gives_the_logits_of_transformers() -> None:
    reference: Any = LlamaForCausalLM.from_pretrained(str(MODEL_DIR), dtype=torch.float32)
    tokens = torch.randint(6, 1024, (2, 300), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, ours = reference(tokens).logits, exported_in_training_form()(tokens)
    assert float((ours - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize("num_tokens", [64, 256])
def test_the_exported_model_recalls_held_out_records(num_tokens: int) -> None:
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    assert recall_accuracy(exported_in_training_form(), tokenizer, num_tokens=num_tokens, num_prompts=40) >= 0.95


def test_held_out_prompts_are_of_the_length_asked_for() -> None:
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    for sample in held_out_prompts(tokenizer, num_tokens=256, num_prompts=20):
        assert 180 <= len(tokenizer.encode(sample.prompt).ids) <= 253


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    tokenizer = train_tokenizer()
    straight = Trainer(CONFIG, TINY, tokenizer)
    losses = [straight.step() for _ in range(6)]
    stopped = Trainer(CONFIG, TINY, tokenizer)
    first = [stopped.step() for _ in range(3)]
    stopped.save(tmp_path)
    resumed = Trainer(CONFIG, TINY, tokenizer)
    resumed.load(tmp_path)
    assert first + [resumed.step() for _ in range(3)] == losses
    assert resumed.progress == straight.progress
    for ours, theirs in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    tokenizer = train_tokenizer()
    Trainer(CONFIG, TINY, tokenizer).save(tmp_path)
    with pytest.raises(ValueError, match="another model shape"):
        Trainer(CONFIG, replace(TINY, num_layers=3), tokenizer).load(tmp_path)


def test_the_learning_rate_warms_up_holds_and_decays() -> None:
    config = TrainConfig(steps=100, warmup_steps=10, decay_steps=40, peak_lr=1.0, final_lr=0.1)
    trainer = Trainer(config, TINY, train_tokenizer())
    rates = [trainer.learning_rate(step) for step in (0, 9, 10, 60, 80, 100)]
    assert rates == pytest.approx([0.1, 1.0, 1.0, 1.0, 0.55, 0.1])
