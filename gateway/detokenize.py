"""Tokens to text as they come: whole characters only, and nothing beyond a stop string.

A `Detokenizer` turns tokens into text deltas whose concatenation is the decoding of all tokens. `StopScanner`
takes those deltas and holds back whatever may be the beginning of a stop string. Both cost the same for the thousandth
token as for the first. One instance per request; event loop only.
"""

import codecs
from collections.abc import Callable, MutableMapping, Sequence
from typing import Final, NamedTuple, Protocol

REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
_MAX_INCOMPLETE: Final = 3
"""A character of UTF-8 lacks its end after at most 3 bytes; decoders show those as 1 to 3 replacement characters."""
_MAX_WINDOW: Final = 16
"""Tokens that may be undecided before the window is cut where the decoding is certain."""

Decode = Callable[[Sequence[int]], str]


class Detokenizer(Protocol):
    """Decodes one choice's tokens."""

    def push(self, token_id: int) -> str:
        """The text that is certain now and was not before; often empty, never half a character."""

    def flush(self) -> str:
        """What was held back, with replacement characters for what is incomplete. Call once, at the end."""


class ByteDetokenizer:
    """Decodes tokens each of which stands for the same bytes wherever it stands; the text is those bytes in UTF-8.

    Costs no more than the bytes. What is not UTF-8 becomes replacement characters, one for each longest beginning of a
    character, as it does where all is decoded at once.
    """

    def __init__(self, bytes_of: Callable[[int], bytes], texts: MutableMapping[int, str]) -> None:
        """`bytes_of` gives a token's bytes, none for a token without text. `texts` is shared by a model's decoders, and
        filled by them: the texts of tokens that are whole characters, which most are."""
        self._bytes_of = bytes_of
        self._texts = texts
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._has_part = False
        """Whether the beginning of a character is held back."""

    def push(self, token_id: int) -> str:
        """The text that is certain now and was not before."""
        if not self._has_part and (known := self._texts.get(token_id)) is not None:
            return known
        text = self._decoder.decode(self._bytes_of(token_id))
        held, _ = self._decoder.getstate()
        if not held and not self._has_part:
            self._texts[token_id] = text
        self._has_part = bool(held)
        return text

    def flush(self) -> str:
        """What was held back: the beginning of one character at most."""
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """Decodes a growing list of tokens with any decoder, a window at a time.

    A token's text may depend on its neighbours: characters span tokens, and many decoders treat the first token
    specially. So the window holds the tokens of the last complete piece as context, and those after it.
    """

    def __init__(self, decode: Decode, is_special: Callable[[int], bool]) -> None:
        """`decode` gives the text of token ids; tokens for which `is_special` holds have none."""
        self._decode = decode
        self._is_special = is_special
        self._window: list[int] = []
        self._num_context = 0
        self._num_emitted = 0

    def push(self, token_id: int) -> str:
        """The text that is certain now and was not before; often empty, never half a character."""
        if self._is_special(token_id):
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        certain = _certain_length(text)
        delta = text[self._num_emitted : certain]
        self._num_emitted = max(self._num_emitted, certain)
        if certain == len(text) and text:
            self._drop(self._num_context)
            self._num_context = len(self._window)
            self._num_emitted = len(self._decode(self._window))
        elif len(self._window) - self._num_context > _MAX_WINDOW:
            self._cut(text)
        return delta

    def flush(self) -> str:
        """What was held back, with replacement characters for what is incomplete. Call once, at the end."""
        return self._decode(self._window)[self._num_emitted :]

    def _drop(self, count: int) -> None:
        del self._window[:count]

    def _cut(self, text: str) -> None:
        """Drops a beginning of the window whose text can no longer change: endless malformed bytes must not fill it."""
        for count in range(len(self._window) - 1, 0, -1):
            head, tail = self._decode(self._window[:count]), self._decode(self._window[count:])
            if tail and len(head) <= self._num_emitted and head + tail == text:
                self._drop(count)
                self._num_context = 0
                self._num_emitted -= len(head)
                return


def _certain_length(text: str) -> int:
    """How much of `text` later tokens cannot change: all but a few replacement characters at its end."""
    length = len(text)
    while length > 0 and len(text) - length < _MAX_INCOMPLETE and text[length - 1] == REPLACEMENT:
        length -= 1
    return length


class Scan(NamedTuple):
    """What may be sent, and the stop string that ended the text, if one did."""

    text: str
    stop: str | None


class StopScanner:
    """Finds the stop string that is complete first, however the text is cut into pieces.

    One automaton per stop string (Knuth, Morris, Pratt): its state is the length of the longest beginning of the string
    that the text ends with, so the longest state is how much must be held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops` are not empty strings; none at all lets everything pass."""
        self._stops = tuple(sorted(set(stops), key=len, reverse=True))
        self._fallbacks = tuple(_fallbacks(stop) for stop in self._stops)
        self._states = [0] * len(self._stops)
        self._held = ""

    def push(self, text: str) -> Scan:
        """Scans further text. After a stop was found, the scanner is used up."""
        if not self._stops:
            return Scan(text, None)
        seen = self._held + text
        for position, char in enumerate(text, start=len(self._held) + 1):
            for index, stop in enumerate(self._stops):
                state = _advance(stop, self._fallbacks[index], self._states[index], char)
                self._states[index] = state
                # Longest first: of two that end here, the one that began earlier cuts more.
                if state == len(stop):
                    return Scan(seen[: position - len(stop)], stop)
        keep = max(self._states)
        self._held = seen[len(seen) - keep :]
        return Scan(seen[: len(seen) - keep], None)

    def skip(self, text: str) -> str:
        """Text that must not be scanned: passes it, after what was held back, and forgets what it may have begun."""
        passed = self._held + text
        self._held = ""
        self._states = [0] * len(self._stops)
        return passed

    def flush(self) -> str:
        """What was held back: the text ended before a stop string was complete."""
        held, self._held = self._held, ""
        return held


def _fallbacks(stop: str) -> tuple[int, ...]:
    """For each length of a matched beginning, the longest shorter beginning it ends with."""
    table = [0] * (len(stop) + 1)
    state = 0
    for length in range(2, len(stop) + 1):
        while state and stop[state] != stop[length - 1]:
            state = table[state]
        if stop[state] == stop[length - 1]:
            state += 1
        table[length] = state
    return tuple(table)


def _advance(stop: str, fallbacks: Sequence[int], state: int, char: str) -> int:
    while state and stop[state] != char:
        state = fallbacks[state]
    return state + 1 if stop[state] == char else 0
