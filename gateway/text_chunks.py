"""Encodes the chunks of an answer that differ in their text and in nothing else: the rest is encoded once per choice.

Never decides what a chunk says: it is told by an example. Event loop only.
"""

from collections.abc import Callable, Mapping
from json.encoder import encode_basestring
from typing import Final

from gateway.json_text import to_json

_TEXT: Final = "\x00"
"""Stands for the text in the example. Names of models, workers and requests have no control characters."""
_ENCODED_TEXT: Final = encode_basestring(_TEXT).encode()


class TextChunks:
    """The chunks of one answer."""

    def __init__(self, make: Callable[[int, str], Mapping[str, object]]) -> None:
        """`make` gives the chunk of a choice, by its index, with a text, which it holds once."""
        self._make = make
        self._around: dict[int, tuple[bytes, bytes]] = {}

    def forget(self) -> None:
        """From now on `make` gives something else."""
        self._around.clear()

    def encode(self, choice_index: int, text: str) -> bytes:
        """`to_json(make(choice_index, text))`, byte for byte."""
        if (around := self._around.get(choice_index)) is None:
            before, after = to_json(self._make(choice_index, _TEXT)).split(_ENCODED_TEXT)
            around = self._around[choice_index] = before, after
        return around[0] + encode_basestring(text).encode() + around[1]
