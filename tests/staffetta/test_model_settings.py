"""generation_config.json: what is read, what is refused by name, and what has no effect."""

import json
from pathlib import Path
from typing import Any

import pytest

from staffetta.identity import ModelRefusedError
from staffetta.model_settings import GenerationDefaults, read_generation_defaults


def read(directory: Path, **fields: Any) -> GenerationDefaults:
    (directory / "generation_config.json").write_text(json.dumps(fields))
    return read_generation_defaults(directory, vocab_size=97)


def test_a_model_without_the_file_has_no_defaults(tmp_path: Path) -> None:
    assert read_generation_defaults(tmp_path, vocab_size=97) == GenerationDefaults()


def test_end_tokens_and_sampling_are_read(tmp_path: Path) -> None:
    defaults = read(tmp_path, eos_token_id=[5, 7, 5], do_sample=True, temperature=0.6, top_k=20, top_p=0.9)
    assert defaults == GenerationDefaults(temperature=0.6, top_k=20, top_p=0.9, eos_token_ids=(5, 7))
    assert read(tmp_path, repetition_penalty=1.1) == GenerationDefaults(repetition_penalty=1.1)


def test_a_model_that_does_not_sample_is_greedy_whatever_its_temperature(tmp_path: Path) -> None:
    assert read(tmp_path, do_sample=False, temperature=0.6).temperature == 0.0


def test_fields_without_effect_are_named(tmp_path: Path) -> None:
    defaults = read(tmp_path, num_beams=4, min_p=0.1, bos_token_id=1, use_cache=False)
    assert defaults.unsupported == ("min_p", "num_beams")


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -1},
        {"top_p": 0},
        {"top_k": 1.5},
        {"repetition_penalty": 0},
        {"do_sample": 1},
        {"eos_token_id": 97},
        {"eos_token_id": "2"},
    ],
    ids=str,
)
def test_a_value_out_of_bounds_is_refused_by_its_name(tmp_path: Path, fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(ModelRefusedError, match=rf"generation_config\.json: {name} is"):
        read(tmp_path, **fields)
