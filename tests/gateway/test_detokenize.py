"""Incremental text: equal to decoding at once, whatever the tokens; stop strings found wherever the text is cut."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import demo
from gateway.detokenize import ByteDetokenizer, Detokenizer, Scan, StopScanner, WindowDetokenizer
from gateway.text import Text
from tests.gateway.running import demo_model, ids_of

TOKEN_IDS = st.integers(0, 1100)
"""All of the vocabulary, special tokens and ids without a token included."""


def byte_detokenizer() -> Detokenizer:
    """What the embedded model's tokenizer gets."""
    return demo_model().text.detokenizer()


def window_detokenizer() -> Detokenizer:
    """What works with any tokenizer."""
    return WindowDetokenizer(demo_model().text.decode, demo_model().text.is_special)


BOTH = pytest.mark.parametrize("make", [byte_detokenizer, window_detokenizer])


def stream(token_ids: list[int], make: Callable[[], Detokenizer] = byte_detokenizer) -> list[str]:
    """The deltas of `token_ids`, what is flushed at the end last."""
    detokenizer = make()
    return [*map(detokenizer.push, token_ids), detokenizer.flush()]


def test_a_tokenizer_gets_bytes_only_where_its_decoder_joins_bytes(tmp_path: Path) -> None:
    assert isinstance(byte_detokenizer(), ByteDetokenizer)
    source = json.loads((demo.locate("demo")[1] / "tokenizer.json").read_text())
    source["decoder"] = {
        "type": "Sequence",
        "decoders": [source["decoder"], {"type": "Replace", "pattern": {"String": "ab"}, "content": "c"}],
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(source))
    assert isinstance(Text(path, None).detokenizer(), WindowDetokenizer)


def scan_pieces(stops: list[str], pieces: list[str]) -> Scan:
    """What comes out of pieces, joined, and the stop string found."""
    scanner = StopScanner(stops)
    out = ""
    for piece in pieces:
        scan = scanner.push(piece)
        out += scan.text
        if scan.stop is not None:
            return Scan(out, scan.stop)
    return Scan(out + scanner.flush(), None)


@BOTH
@given(st.lists(TOKEN_IDS, max_size=60))
@settings(max_examples=200, deadline=None)
def test_deltas_concatenate_to_the_decoding_of_all_tokens(
    make: Callable[[], Detokenizer], token_ids: list[int]
) -> None:
    assert "".join(stream(token_ids, make)) == demo_model().text.decode(token_ids)


BYTE_TOKENS = [token_id for token_id in range(1024) if len(demo_model().text.token_bytes(token_id)) == 1]


@BOTH
@given(st.lists(st.sampled_from(BYTE_TOKENS), max_size=60))
@settings(max_examples=200, deadline=None)
def test_arbitrary_bytes_decode_as_they_would_at_once(make: Callable[[], Detokenizer], token_ids: list[int]) -> None:
    assert "".join(stream(token_ids, make)) == demo_model().text.decode(token_ids)


@given(st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_no_delta_of_whole_text_holds_part_of_a_character(text: str) -> None:
    deltas = stream(ids_of(text) if text else [])
    assert "".join(deltas) == text
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in delta for delta in deltas)


@BOTH
def test_a_character_of_four_tokens_comes_out_with_its_last(make: Callable[[], Detokenizer]) -> None:
    assert stream(ids_of("\N{GRINNING FACE}!"), make) == ["", "", "", "\N{GRINNING FACE}", "!", ""]


@BOTH
def test_an_incomplete_character_is_held_until_the_flush(make: Callable[[], Detokenizer]) -> None:
    assert stream(ids_of("a\N{GRINNING FACE}")[:-1], make) == ["a", "", "", "", "\N{REPLACEMENT CHARACTER}"]


def test_special_tokens_have_no_text() -> None:
    assert stream([1, 3, *ids_of("hi"), 2]) == ["", "", *stream(ids_of("hi"))[:-1], "", ""]


MALFORMED = next(token_id for token_id in BYTE_TOKENS if demo_model().text.token_bytes(token_id) == b"\x80")


@pytest.mark.parametrize("token_id", [MALFORMED, 3, 1100])
def test_endless_malformed_or_silent_tokens_do_not_grow_the_window(token_id: int) -> None:
    longest = 0

    def decode(token_ids: object) -> str:
        nonlocal longest
        assert isinstance(token_ids, list)
        longest = max(longest, len(token_ids))
        return demo_model().text.decode(token_ids)

    detokenizer = WindowDetokenizer(decode, lambda token: token < 6 or token >= 1024)
    text = "".join(detokenizer.push(token_id) for _ in range(400)) + detokenizer.flush()
    assert text == demo_model().text.decode([token_id] * 400)
    assert longest <= 40


@given(
    st.text("ab", max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.data(),
)
@settings(max_examples=400, deadline=None)
def test_stop_strings_are_found_the_same_however_the_text_is_cut(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    edges = [0, *cuts, len(text)]
    pieces = [text[start:stop] for start, stop in pairwise(edges)]
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    expected = Scan(text, None)
    if ends:
        end, _, stop = min(ends)
        expected = Scan(text[: end - len(stop)], stop)
    assert scan_pieces(stops, pieces) == expected


def test_a_stop_string_is_found_across_every_split_point() -> None:
    text = "The end. STOP here"
    for cut in range(len(text) + 1):
        assert scan_pieces(["STOP"], [text[:cut], text[cut:]]) == Scan("The end. ", "STOP")


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    scanner = StopScanner(["ab", "bcd"])
    assert scanner.push("xxb") == Scan("xx", None)
    assert scanner.push("c") == Scan("", None)
    assert scanner.push("a") == Scan("bc", None)
    assert scanner.flush() == "a"


def test_of_two_stops_that_end_together_the_longer_cuts() -> None:
    assert scan_pieces(["b", "ab"], ["xab"]) == Scan("x", "ab")


def test_skipped_text_passes_with_what_was_held_and_begins_nothing() -> None:
    scanner = StopScanner(["ab"])
    assert scanner.push("xa") == Scan("x", None)
    assert scanner.skip("b") == "ab"
    assert scanner.push("b") == Scan("b", None)
