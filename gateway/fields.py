"""Reads the fields of a JSON object one by one, each with its type; what nobody read is known by name at the end.

Errors name the field, what it is and what it should be. null is the same as absent, as clients of this API expect.
"""

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Final, NoReturn

from staffetta.errors import InvalidRequestError, UnsupportedError
from staffetta.validate import as_float32

MAX_IGNORED: Final = 16
_UNPRINTABLE = re.compile(r"[^A-Za-z0-9_.-]")
_MAX_NAME_CHARS: Final = 64

_TYPE_NAMES: Final = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "an integer"}


def parse_object(body: bytes) -> dict[str, object]:
    """The JSON object in `body`. Raises InvalidRequestError, also for numbers that JSON does not have."""
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        where = f" at line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise InvalidRequestError(f"the body is not valid JSON{where}; send one JSON object") from None
    if not isinstance(value, dict):
        raise InvalidRequestError(f"the body is {_describe(value)}; send one JSON object")
    return value


class Fields:
    """One object of a request. `path` is what error messages put before a field's name."""

    def __init__(self, values: Mapping[str, object], *, path: str = "") -> None:
        self._values = values
        self._path = path
        self._known: set[str] = set()
        self._sections: list[Fields] = []

    def text(self, name: str) -> str | None:
        """A string."""
        value = self.raw(name)
        return value if value is None or isinstance(value, str) else self._refuse(name, value, "a string")

    def integer(self, name: str) -> int | None:
        """An integer; a boolean is none."""
        value = self.raw(name)
        if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        return self._refuse(name, value, "an integer")

    def number(self, name: str) -> float | None:
        """A number, rounded to float32: what the wire carries is what gets checked."""
        value = self.raw(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            self._refuse(name, value, "a number")
        try:
            return as_float32(float(value))
        except OverflowError:
            return self._refuse(name, value, "a number within range")

    def boolean(self, name: str) -> bool | None:
        """A boolean."""
        value = self.raw(name)
        return value if value is None or isinstance(value, bool) else self._refuse(name, value, "a boolean")

    def strings(self, name: str) -> tuple[str, ...]:
        """A string or a list of strings."""
        value = self.raw(name)
        if value is None:
            return ()
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
            self._refuse(name, value, "a string or a list of strings")
        return tuple(values)

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of integers."""
        value = self.raw(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(map(_is_integer, value)):
            self._refuse(name, value, "a list of integers")
        return tuple(value)

    def section(self, name: str) -> "Fields | None":
        """An object."""
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            self._refuse(name, value, "an object")
        return self._section(value, f"{self._path}{name}.")

    def sections(self, name: str) -> list["Fields"]:
        """A list of objects."""
        value = self.raw(name)
        if not isinstance(value, list):
            self._refuse(name, value, "a list of objects")
        for index, item in enumerate(value):
            if not isinstance(item, dict):
                self._refuse(f"{name}[{index}]", item, "an object")
        return [self._section(item, f"{self._path}{name}[{index}].") for index, item in enumerate(value)]

    def only(self, name: str, neutral: Sequence[object], *, why: str) -> None:
        """Refuses a field that asks for what this server does not do, unless its value asks for nothing."""
        value = self.raw(name)
        # Equality across types: 0 and 0.0 are the same wish, False and 0 are not.
        if value is None or any(
            value == item and isinstance(value, bool) == isinstance(item, bool) for item in neutral
        ):
            return
        raise UnsupportedError(f"{self._path}{name} is not supported: {why}; leave it out", param=self._path + name)

    def raw(self, name: str) -> object:
        """The value as it came; None when absent."""
        self._known.add(name)
        return self._values.get(name)

    def refuse(self, name: str, allowed: str) -> NoReturn:
        """Raises the error for a field whose type or value is wrong."""
        self._refuse(name, self._values.get(name), allowed)

    def ignored(self) -> tuple[str, ...]:
        """The fields that nobody read, each with the nearest name there is, printable, not too many."""
        named = list(islice(self._unread(), MAX_IGNORED + 1))
        return (*named[:MAX_IGNORED], "...") if len(named) > MAX_IGNORED else tuple(named)

    def _unread(self) -> Iterator[str]:
        for name in self._values:
            if name not in self._known:
                printable = _UNPRINTABLE.sub("_", name[:_MAX_NAME_CHARS])
                nearest = difflib.get_close_matches(printable, self._known, n=1)
                yield self._path + (f"{printable} (nearest: {nearest[0]})" if nearest else printable)
        for section in self._sections:
            yield from section._unread()

    def _section(self, values: Mapping[str, object], path: str) -> "Fields":
        section = Fields(values, path=path)
        self._sections.append(section)
        return section

    def _refuse(self, name: str, value: object, allowed: str) -> NoReturn:
        param = self._path + name
        if value is None:
            raise InvalidRequestError(f"{param} is missing; send {allowed}", param=param)
        raise InvalidRequestError(f"{param} is {_describe(value)}; send {allowed}", param=param)


def _describe(value: object) -> str:
    if value is None:
        return "null"
    return _TYPE_NAMES.get(type(value), "a number")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)
