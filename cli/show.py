"""`staffetta config show ROLE`: the settings a role would start with, and where each comes from.

A secret's value is never printed.
"""

from collections.abc import Sequence
from typing import Any

from cli.output import write, write_json
from staffetta.config.load import Loaded
from staffetta.config.settings import role_of, settings_of


def show_values(loaded: Loaded[Any]) -> None:
    """Prints a line per setting: its name and value."""
    _write_table([(name, value) for name, value in _values(loaded).items()])


def show_origins(loaded: Loaded[Any]) -> None:
    """Prints a line per setting: its name, its value and where that comes from."""
    _write_table([(name, value, str(loaded.origins[name])) for name, value in _values(loaded).items()])


def show_json(loaded: Loaded[Any]) -> None:
    """Prints every setting with its value and origin as one JSON object."""
    settings = {
        name: {"value": value, "origin": {"kind": origin.kind.value, "where": origin.where}}
        for name, value in _values(loaded).items()
        for origin in (loaded.origins[name],)
    }
    write_json({"role": role_of(type(loaded.config)), "settings": settings})


def _values(loaded: Loaded[Any]) -> dict[str, str]:
    settings = settings_of(type(loaded.config))
    return {name: setting.format(getattr(loaded.config, name)) for name, setting in settings.items()}


def _write_table(rows: Sequence[tuple[str, ...]]) -> None:
    """Columns as wide as their widest cell, up to 40 characters."""
    widths = [min(40, max(map(len, column))) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        write("  ".join(cells).rstrip() + "\n")
