"""The tokenizer of random models: any text survives, any id has a text, and the gateway takes it as it is."""

from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from bench.tokenizer import CHAT_TEMPLATE, FIRST_WORD_ID, SPECIAL_TOKENS, make_tokenizer, write_tokenizer
from bench.workload import FIRST_PROMPT_TOKEN_ID
from gateway.template import ChatTemplate, Message
from gateway.text import Text


@cache
def tokenizer() -> Tokenizer:
    return make_tokenizer(2000)


@given(st.text(max_size=40))
@settings(max_examples=100, deadline=None)
def test_any_text_decodes_to_itself(text: str) -> None:
    ids = tokenizer().encode(text).ids
    assert tokenizer().decode(ids, skip_special_tokens=False) == text


def test_words_are_few_tokens() -> None:
    assert tokenizer().encode("ab").tokens == ["ab"]
    assert tokenizer().encode("ab cde").tokens == ["ab", "\u0120c", "de"]
    assert make_tokenizer(32_000).encode("otter").tokens == ["ott", "er"]


@pytest.mark.parametrize("size", [FIRST_WORD_ID, FIRST_WORD_ID + 1, 2000, 32_000])
def test_every_id_below_the_size_is_a_token_of_its_own(size: int) -> None:
    vocabulary = make_tokenizer(size).get_vocab()
    assert sorted(vocabulary.values()) == list(range(size))


def test_ids_that_prompts_are_drawn_from_are_whole_words() -> None:
    assert FIRST_PROMPT_TOKEN_ID == FIRST_WORD_ID
    texts = [tokenizer().decode([token_id]) for token_id in range(FIRST_WORD_ID, 2000)]
    assert all(text and text.isascii() for text in texts)


def test_a_size_without_room_for_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size is 261, needs at least 262"):
        make_tokenizer(261)


def test_the_gateway_renders_its_chat(tmp_path: Path) -> None:
    write_tokenizer(tokenizer(), tmp_path, max_positions=128)
    template = ChatTemplate(CHAT_TEMPLATE, bos_token=SPECIAL_TOKENS[1], eos_token=SPECIAL_TOKENS[2])
    ids = Text(tmp_path / "tokenizer.json", template).encode_chat([Message("user", "ab")])
    assert tokenizer().decode(ids, skip_special_tokens=False) == "<|bos|><|user|>ab<|eos|><|assistant|>"
    assert ids[:2] == [SPECIAL_TOKENS.index("<|bos|>"), SPECIAL_TOKENS.index("<|user|>")]
