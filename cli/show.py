"""`staffetta config show ROLE`: the settings a role would start with, and where each comes from."""

from typing import Any

from cli.output import Output, write, write_json
from staffetta.config.load import Loaded
from staffetta.config.settings import role_of, settings_of


def show_config(loaded: Loaded[Any], output: Output, *, with_origin: bool) -> None:
    """Prints every setting; a secret's value never."""
    schema = type(loaded.config)
    rows = [
        (name, setting.format(getattr(loaded.config, name)), loaded.origins[name])
        for name, setting in settings_of(schema).items()
    ]
    if output is Output.JSON:
        settings = {
            name: {"value": value, "origin": {"kind": origin.kind.value, "where": origin.where}}
            for name, value, origin in rows
        }
        write_json({"role": role_of(schema), "settings": settings})
        return
    name_width = max(len(name) for name, _, _ in rows)
    value_width = min(40, max(len(value) for _, value, _ in rows))
    for name, value, origin in rows:
        line = f"{name:<{name_width}}  {value:<{value_width}}  {origin if with_origin else ''}"
        write(line.rstrip() + "\n")
