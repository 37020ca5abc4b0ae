"""The tokenizer loses nothing, keeps digits and names whole, and is what the exported directory holds."""

import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from demo import MODEL_DIR
from demo.corpus import COLORS, NAMES, PLACES, SPECIAL_TOKENS, RecallSample
from demo.recall import frame
from demo.tokenizer import VOCAB_SIZE, train_tokenizer

TOKENIZER = train_tokenizer()


@given(st.text())
def test_any_text_decodes_to_itself(text: str) -> None:
    if not any(special in text for special in SPECIAL_TOKENS):
        ids = TOKENIZER.encode(text, add_special_tokens=False).ids
        assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


@given(st.binary())
def test_any_bytes_decode_to_themselves(raw: bytes) -> None:
    text = raw.decode("utf-8", errors="replace") + raw.decode("latin-1")
    assert TOKENIZER.decode(TOKENIZER.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


def test_training_gives_the_vocabulary_that_is_exported() -> None:
    exported = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    assert TOKENIZER.get_vocab_size() == VOCAB_SIZE
    assert exported.get_vocab() == TOKENIZER.get_vocab()
    assert exported.to_str() == TOKENIZER.to_str()


def test_digits_are_single_tokens() -> None:
    assert TOKENIZER.encode("is 7341.").tokens == ["is", "Ġ", "7", "3", "4", "1", "."]
    multi = [token for token in TOKENIZER.get_vocab() if len(token) > 1 and set(token) & set(string.digits)]
    assert multi == []


@pytest.mark.parametrize("words", [NAMES, COLORS, PLACES])
def test_key_words_are_single_tokens(words: tuple[str, ...]) -> None:
    assert [word for word in words if len(TOKENIZER.encode(f" {word}").ids) != 1] == []


def test_transformers_renders_the_chat_as_it_was_trained() -> None:
    codec: Any = AutoTokenizer.from_pretrained(str(MODEL_DIR))
    sample = RecallSample(prompt="The code of the otter is 7341. What is the code of the otter?", answer="7341")
    chat = [{"role": "user", "content": sample.prompt}]
    assert codec.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) == frame(sample)
    ids = codec.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == TOKENIZER.encode(frame(sample), add_special_tokens=False).ids
    longer = [{"role": "system", "content": "a"}, *chat, {"role": "assistant", "content": "b"}]
    full = codec.apply_chat_template(longer, tokenize=False)
    assert full == f"<|bos|><|system|>a<|end|><|user|>{sample.prompt}<|end|><|assistant|>b<|end|>"
