"""The schema as data: the settings of each role, and how one setting's text becomes a value and text again.

Flags, file keys and variables all pass through `Setting.parse`, so a value means the same wherever it is written.
Nothing here reads an environment or a file.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType, NoneType
from typing import Any, Final, Literal, get_args, get_origin

from staffetta import cpus, failpoint
from staffetta.address import parse_address
from staffetta.config.schema import ClientConfig, DecodeConfig, Form, GatewayConfig, PrefillConfig, ServeConfig

ROLES: Final[Mapping[str, type]] = MappingProxyType(
    {
        "gateway": GatewayConfig,
        "prefill": PrefillConfig,
        "decode": DecodeConfig,
        "serve": ServeConfig,
        "client": ClientConfig,
    }
)
"""Every role's name, as it is written in files and variables, and its part of the schema."""

_HIDDEN: Final = "(not shown)"

_EXAMPLES: Final[Mapping[Form, str]] = MappingProxyType(
    {"address": "127.0.0.1:0", "key": "$(openssl rand -hex 32)", "failpoint": "tcp.serving:kill:1", "cpus": "0-3"}
)

_METAVARS: Final[Mapping[Form, str]] = MappingProxyType(
    {"bytes": "BYTES", "address": "HOST:PORT", "key": "HEX", "failpoint": "FAULT", "cpus": "CPUS"}
)

_BYTE_UNITS: Final = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_BYTES: Final = re.compile(r"([0-9]+) ?([KMGT]iB|B|)")
_TRUE: Final = frozenset({"true", "yes", "on", "1"})
_FALSE: Final = frozenset({"false", "no", "off", "0"})


class BadValueError(ValueError):
    """A text is not a value of its setting. The message says what one looks like; it never repeats the text."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting of one role, as the schema declares it."""

    name: str
    kind: type
    """bool, int, float or str; of a list, its members' type."""
    is_list: bool
    is_optional: bool
    choices: tuple[str, ...]
    default: Any
    help: str
    form: Form
    minimum: float
    maximum: float | None
    is_secret: bool

    @property
    def flag(self) -> str:
        """The command line's name for it."""
        return "--" + self.name.replace("_", "-")

    @property
    def negative_flag(self) -> str:
        """The flag that sets a bool to false."""
        positive = self.name.removeprefix("no_") if self.name.startswith("no_") else f"no_{self.name}"
        return "--" + positive.replace("_", "-")

    @property
    def metavar(self) -> str:
        """What `--help` calls the value."""
        if self.choices:
            return "{" + ",".join(self.choices) + "}"
        if self.form != "plain":
            return _METAVARS[self.form]
        if self.kind is float:
            return "SECONDS" if self.name.endswith("_s") else "NUMBER"
        return {int: "N", str: "TEXT"}.get(self.kind, "")

    @property
    def example(self) -> str:
        """The default where there is one, else a text that `parse` takes, or for a key the shell's word for one."""
        default = self.format(self.default)
        return default or _EXAMPLES.get(self.form) or next(iter(self.choices), str(max(1, math.ceil(self.minimum))))

    def parse(self, text: str) -> Any:
        """The value that `text` stands for; a list is split at commas. Raises BadValueError."""
        if self.is_list:
            return tuple(self._parse_one(part.strip()) for part in text.split(",")) if text else ()
        return self._parse_one(text)

    def format(self, value: Any) -> str:
        """Text that `parse` takes back; for a secret, whether there is one."""
        if self.is_secret:
            return _HIDDEN if value else ""
        if isinstance(value, tuple):
            return ",".join(map(str, value))
        if isinstance(value, bool):
            return "true" if value else "false"
        if self.form == "bytes":
            return _format_bytes(value)
        return "" if value is None else str(value)

    def _parse_one(self, text: str) -> Any:
        if self.choices:
            if text not in self.choices:
                raise BadValueError(f"it must be one of {', '.join(self.choices)}")
            return text
        if self.kind is bool:
            return _parse_bool(text)
        if self.kind is str:
            return _parse_text(text, self)
        return self._parse_number(text)

    def _parse_number(self, text: str) -> int | float:
        if self.form == "bytes":
            value: int | float = _parse_bytes(text)
        else:
            try:
                value = int(text) if self.kind is int else float(text)
            except ValueError:
                raise BadValueError(
                    "it must be a whole number" if self.kind is int else "it must be a number"
                ) from None
        if not math.isfinite(value):
            raise BadValueError("it must be a finite number")
        if value < self.minimum:
            raise BadValueError(f"it must be at least {self.minimum:g}")
        if self.maximum is not None and value > self.maximum:
            raise BadValueError(f"it must be at most {self.maximum:g}")
        return value


def settings_of(schema: type) -> Mapping[str, Setting]:
    """The settings of one role, by name, in the schema's order."""
    return MappingProxyType({field.name: _setting(field) for field in dataclasses.fields(schema)})


def role_of(schema: type) -> str:
    """The name of the role that `schema` configures."""
    return next(role for role, candidate in ROLES.items() if candidate is schema)


def _setting(field: "dataclasses.Field[Any]") -> Setting:
    kind: Any = field.type
    is_list = get_origin(kind) is tuple
    if is_list:
        kind = get_args(kind)[0]
    members = get_args(kind)
    is_optional = NoneType in members
    if is_optional:
        kind = next(member for member in members if member is not NoneType)
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    return Setting(
        name=field.name,
        kind=str if choices else kind,
        is_list=is_list,
        is_optional=is_optional,
        choices=choices,
        default=field.default,
        help=field.metadata["help"],
        form=field.metadata["form"],
        minimum=field.metadata["minimum"],
        maximum=field.metadata["maximum"],
        is_secret=field.metadata["secret"],
    )


def _parse_bool(text: str) -> bool:
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise BadValueError("it must be true or false")


def _parse_bytes(text: str) -> int:
    match = _BYTES.fullmatch(text)
    if match is None:
        raise BadValueError("it must be bytes, such as 67108864, 64MiB or 2GiB")
    return int(match[1]) * _BYTE_UNITS[match[2]]


def _format_bytes(value: int) -> str:
    """In the largest unit that divides `value`."""
    unit = next(unit for unit in ("TiB", "GiB", "MiB", "KiB", "") if value % _BYTE_UNITS[unit] == 0)
    return f"{value // _BYTE_UNITS[unit]}{unit}" if value else "0"


def _parse_text(text: str, setting: Setting) -> str:
    if setting.form == "address" and (text or setting.default not in ("", None)):
        try:
            parse_address(text)
        except ValueError:
            raise BadValueError("it must be host:port, such as 127.0.0.1:8000 or [::1]:8000") from None
    if setting.form == "key" and text and not re.fullmatch(r"(?:[0-9a-fA-F]{2}){16,64}", text):
        raise BadValueError("it must be 16 to 64 bytes in hexadecimal; `openssl rand -hex 32` makes one")
    if setting.form == "failpoint":
        try:
            failpoint.parse(text)
        except ValueError:
            raise BadValueError(f"it must be {failpoint.FORM}") from None
    if setting.form == "cpus":
        try:
            cpus.parse_cpus((text,))
        except ValueError:
            raise BadValueError(f"it must be {cpus.FORM}") from None
    return text
