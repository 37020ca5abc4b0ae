"""Builds a role's configuration from the command line, the environment, a file and the schema's defaults.

Precedence: flag > variable > file > default, and within variables and files the role's own entry before the shared one.
Every name that nobody knows is an error that proposes the nearest one, wherever it is written: a setting that is
silently ignored costs more than one that is refused. Secrets are never printed.

File (`--config FILE` or `STAFFETTA_CONFIG`), one for all roles:

    common: {model: demo}
    prefill: {max_batch_tokens: 1024}
    decode: {max_sequences: 32}
    gateway: {http: "0.0.0.0:8000"}

Variables: `STAFFETTA_PREFILL_MAX_BATCH_TOKENS` before `STAFFETTA_MAX_BATCH_TOKENS`; an empty one counts as unset.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from staffetta.config.environment import PREFIX, process_environment
from staffetta.config.file import read_file
from staffetta.config.flags import FlagParser, add_settings, given_flags
from staffetta.config.origin import DEFAULT, Origin, OriginKind
from staffetta.config.schema import ModelConfig
from staffetta.config.settings import ROLES, BadValueError, Setting, role_of, settings_of
from staffetta.config.unknown import unknown_setting
from staffetta.exits import UsageError

T = TypeVar("T")
R = TypeVar("R", bound=ModelConfig)

CONFIG_VARIABLE = f"{PREFIX}CONFIG"


@dataclass(frozen=True, slots=True)
class Loaded(Generic[T]):
    """A configuration and, for each setting by name, where its value came from."""

    config: T
    origins: Mapping[str, Origin]


def load(schema: type[T], argv: Sequence[str], *, environ: Mapping[str, str] | None = None) -> Loaded[T]:
    """Loads the role that `schema` configures. `environ` defaults to the process's. Raises UsageError."""
    parser = FlagParser(prog=f"staffetta {role_of(schema)}", description=(schema.__doc__ or "").partition("\n")[0])
    add_settings(parser, schema)
    return resolve(schema, parser.parse(argv), environ=environ)


def load_role(schema: type[R], argv: Sequence[str], *, environ: Mapping[str, str] | None = None) -> R:
    """Loads a role that was started by itself, whose peers must hash prompts by the same key. Raises UsageError.

    Only `serve` draws a key, because it starts everybody who needs it.
    """
    config = load(schema, argv, environ=environ).config
    if not config.cluster_key:
        raise UsageError(
            "CLUSTER_KEY_MISSING",
            f"{role_of(schema)} has no cluster_key",
            why="the gateway and all workers of a cluster key their block hashes with the same one",
            fix=f"export {PREFIX}CLUSTER_KEY=$(openssl rand -hex 32)",
        )
    return config


def resolve(schema: type[T], flags: argparse.Namespace, *, environ: Mapping[str, str] | None = None) -> Loaded[T]:
    """Completes parsed flags, from a parser that `add_settings` prepared, from environment, file and defaults."""
    if environ is None:
        environ = process_environment()
    _check_variables(environ)
    role = role_of(schema)
    path = flags.config or environ.get(CONFIG_VARIABLE, "")
    sections = read_file(path) if path else {}
    flag_values = given_flags(flags)
    values: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    for name, setting in settings_of(schema).items():
        if name in flag_values:
            values[name], origins[name] = _from_flag(setting, flag_values[name])
        elif (variable := next(filter(environ.get, _variables(name, role)), None)) is not None:
            is_own = variable == _variables(name, role)[0]
            origins[name] = Origin(OriginKind.ENVIRONMENT, variable, is_own=is_own)
            values[name] = parse(setting, environ[variable], origins[name])
        elif (section := next((s for s in (role, "common") if name in sections.get(s, {})), None)) is not None:
            origins[name] = Origin(OriginKind.FILE, f"{path}: {section}.{name}", is_own=section == role)
            values[name] = _from_file(setting, sections[section][name], origins[name])
        else:
            values[name], origins[name] = setting.default, DEFAULT
    return Loaded(schema(**values), origins)


def parse(setting: Setting, text: str, origin: Origin) -> Any:
    """The value of `text`. Raises UsageError naming the origin; a secret's text is not repeated."""
    try:
        return setting.parse(text)
    except BadValueError as error:
        shown = "its value" if setting.is_secret else repr(text)
        raise UsageError(
            "BAD_VALUE",
            f"{origin.where}: {shown} cannot be used for {setting.name}",
            why=f"{setting.help}: {error}",
            fix=f"{setting.flag} {setting.example}",
        ) from None


def _from_flag(setting: Setting, given: Sequence[str] | bool) -> tuple[Any, Origin]:
    if isinstance(given, bool):
        return given, Origin(OriginKind.FLAG, setting.flag if given else setting.negative_flag, is_own=True)
    origin = Origin(OriginKind.FLAG, setting.flag, is_own=True)
    parsed = [parse(setting, text, origin) for text in given]
    return (tuple(part for parts in parsed for part in parts) if setting.is_list else parsed[-1]), origin


def _from_file(setting: Setting, value: object, origin: Origin) -> Any:
    """A value that YAML has typed already: what it takes for a number is no text, and the other way round."""
    if setting.is_list and isinstance(value, list):
        return tuple(part for item in value for part in _from_file(setting, item, origin))
    if setting.kind is bool and isinstance(value, bool):
        return value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(value, str) or (is_number and setting.kind in (int, float)):
        return parse(setting, str(value), origin)
    wanted = "true or false" if setting.kind is bool else "text in quotes" if setting.kind is str else "a number"
    raise UsageError(
        "BAD_VALUE",
        f"{origin.where}: the value is read as {_yaml_type(value)}",
        why=f"{setting.help}: {'a list of ' if setting.is_list else ''}{wanted} is needed",
        fix=f"{setting.name}: {_yaml_example(setting)}",
    )


def _variables(name: str, role: str) -> tuple[str, str]:
    """The role's own variable and the shared one."""
    return f"{PREFIX}{role}_{name}".upper(), f"{PREFIX}{name}".upper()


def _check_variables(environ: Mapping[str, str]) -> None:
    known = {CONFIG_VARIABLE}
    for role, schema in ROLES.items():
        for name in settings_of(schema):
            known.update(_variables(name, role))
    for variable in sorted(environ):
        if variable.startswith(PREFIX) and variable not in known:
            raise unknown_setting(
                f"no variable is called {variable}",
                variable,
                known,
                fix=f"unset {variable}",
                replacement=f'export {{}}="${variable}"; unset {variable}',
            )


def _yaml_example(setting: Setting) -> str:
    if setting.kind is str:
        return f'["{setting.example}"]' if setting.is_list else f'"{setting.example}"'
    return setting.example


def _yaml_type(value: object) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "a mapping"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)
