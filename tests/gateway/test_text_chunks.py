"""Chunks encoded around their text: the same bytes as encoded whole, and the shapes that clients read."""

import json
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.json_text import to_json
from gateway.openai_request import parse_chat, parse_completion
from gateway.openai_response import ChatShape, CompletionShape
from gateway.request import Delta, Placed, Started
from gateway.text_chunks import TextChunks
from tests.gateway.fakes import make_token
from tests.gateway.running import demo_model

STARTED = Started("ab12", "demo", 7, (1, 2))
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], "stream": True}
COMPLETION = {"model": "demo", "prompt": "hi", "stream": True}
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    ['"', "\\", "\x00", "\u2028", "€😀"]
)


def make_chunk(index: int, text: str) -> Mapping[str, object]:
    return {"id": "x", "choices": [{"index": index, "delta": {"content": text}, "none": None}], "name": "é"}


def placed(digest: str) -> Placed:
    return Placed("decode-0", digest, lambda: False)


@given(st.lists(st.tuples(st.integers(0, 3), TEXTS), max_size=20))
def test_a_chunk_has_the_bytes_of_one_encoded_whole(news: list[tuple[int, str]]) -> None:
    chunks = TextChunks(make_chunk)
    assert [chunks.encode(*each) for each in news] == [to_json(make_chunk(*each)) for each in news]


def test_what_is_around_the_text_is_made_once_for_each_choice_until_it_changes() -> None:
    asked: list[int] = []

    def make(index: int, text: str) -> Mapping[str, object]:
        asked.append(index)
        return {"text": text, "times": len(asked)}

    chunks = TextChunks(make)
    assert [chunks.encode(index, "a") for index in (0, 1, 0, 1)] == [
        b'{"text":"a","times":1}',
        b'{"text":"a","times":2}',
        b'{"text":"a","times":1}',
        b'{"text":"a","times":2}',
    ]
    chunks.forget()
    assert chunks.encode(0, "b") == b'{"text":"b","times":3}'
    assert asked == [0, 1, 0]


def test_an_example_that_does_not_hold_its_text_once_is_refused() -> None:
    for example in ({}, {"text": "\x00", "again": "\x00"}):
        with pytest.raises(ValueError, match="unpack"):
            TextChunks(lambda _index, _text, example=example: example).encode(0, "a")  # type: ignore[misc]


def test_a_chat_chunk_says_what_openai_says_and_who_computed_it() -> None:
    parsed = parse_chat(CHAT | {"n": 2})
    shape = ChatShape(parsed, STARTED, demo_model().text, created=5)
    shape.place(placed("lost"))
    assert shape.delta(Delta(1, "a", (make_token(0, 9),))) is not None
    shape.place(placed("numerics-digest"))
    chunk = shape.delta(Delta(1, 'say "é"\n', (make_token(0, 9),)))
    assert chunk is not None
    assert json.loads(chunk) == {
        "id": "chatcmpl-ab12",
        "object": "chat.completion.chunk",
        "created": 5,
        "model": "demo",
        "system_fingerprint": "numerics-dig",
        "choices": [{"index": 1, "delta": {"content": 'say "é"\n'}, "logprobs": None, "finish_reason": None}],
    }
    assert shape.delta(Delta(1, "", (make_token(1, 9),))) is None


def test_a_completion_chunk_has_a_null_for_usage_where_usage_was_asked_for() -> None:
    parsed = parse_completion(COMPLETION | {"stream_options": {"include_usage": True}})
    shape = CompletionShape(parsed, STARTED, demo_model().text, created=5)
    shape.place(placed("numerics"))
    chunk = shape.delta(Delta(0, "a", ()))
    assert chunk is not None
    assert json.loads(chunk) == {
        "id": "cmpl-ab12",
        "object": "text_completion",
        "created": 5,
        "model": "demo",
        "system_fingerprint": "numerics",
        "choices": [{"index": 0, "text": "a", "logprobs": None, "finish_reason": None}],
        "usage": None,
    }


def test_a_chunk_with_log_probabilities_comes_with_every_token_also_where_text_is_held_back() -> None:
    shape = ChatShape(parse_chat(CHAT | {"logprobs": True}), STARTED, demo_model().text, created=5)
    shape.place(placed("numerics"))
    chunk = shape.delta(Delta(0, "", (make_token(0, 351, num_logprobs=0),)))
    assert chunk is not None
    choice = json.loads(chunk)["choices"][0]
    assert choice["delta"] == {"content": ""}
    assert choice["logprobs"]["content"] == [
        {"token": " the", "logprob": -0.5, "bytes": [32, 116, 104, 101], "top_logprobs": []}
    ]
