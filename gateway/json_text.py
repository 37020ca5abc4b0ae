"""Encodes answers as JSON, and long ones in pieces.

The standard encoder keeps the interpreter's lock until its whole argument is text: an answer of megabytes, encoded at
once, stops every other thread for as long. In pieces, it is never given more than one element of a long list.
"""

import json
from functools import partial
from typing import Final

MAX_AT_ONCE: Final = 64
"""Elements of a list that are encoded at once."""

_dumps = partial(json.dumps, ensure_ascii=False, separators=(",", ":"))


def to_json(value: object) -> bytes:
    """UTF-8, without spaces."""
    return _dumps(value).encode()


def long_to_json(value: object) -> bytes:
    """The same, in pieces. Keys of objects are strings."""
    return _text(value).encode()


def _text(value: object) -> str:
    match value:
        case dict():
            return "{" + ",".join([f"{_dumps(key)}:{_text(each)}" for key, each in value.items()]) + "}"
        case list() if len(value) > MAX_AT_ONCE:
            return "[" + ",".join([_dumps(each) for each in value]) + "]"
        case list():
            return "[" + ",".join([_text(each) for each in value]) + "]"
        case _:
            return _dumps(value)
