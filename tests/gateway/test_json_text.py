"""JSON in pieces is JSON."""

import json

import pytest

from gateway import json_text
from gateway.json_text import long_to_json, to_json

VALUES: list[object] = [
    None,
    -0.5,
    'a "quote", a \\ and ü',
    [],
    {},
    [1, [2, {"three": [None, True]}]],
    {"empty": {}, "list": [[]], 'key "q"': 1e-7},
    {"long": [{"text": "é", "tops": {"1": -0.25}}, None] * 200, "short": [1.5, "x"]},
    [list(range(300))] * 3,
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_pieces_join_to_the_text_of_the_whole(value: object) -> None:
    assert (
        long_to_json(value) == to_json(value) == json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    )


def test_no_piece_is_longer_than_an_element_of_a_long_list(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    dumps = json_text._dumps

    def watched(value: object) -> str:
        text = dumps(value)
        lengths.append(len(text))
        return text

    monkeypatch.setattr(json_text, "_dumps", watched)
    long_to_json({"choices": [{"prompt_logprobs": [{"1": {"logprob": -1.0}}] * 5000}] * 4})
    assert max(lengths) == len('{"1":{"logprob":-1.0}}')
