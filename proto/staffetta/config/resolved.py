"""A resolved configuration as text, for handing it to a child process through a pipe: JSON, every setting, no defaults.

Only between processes of one start of one version; it holds secrets and is never stored, logged or put on a command
line.
"""

import dataclasses
import json
from typing import Any, TypeVar

from staffetta.config.settings import settings_of

T = TypeVar("T")


def encode(config: Any) -> str:
    """The configuration as one line."""
    return json.dumps({field.name: getattr(config, field.name) for field in dataclasses.fields(config)})


def decode(schema: type[T], text: str) -> T:
    """The configuration again. Raises ValueError when the text was not made by `encode` from the same schema."""
    values = json.loads(text)
    settings = settings_of(schema)
    if not isinstance(values, dict) or values.keys() != settings.keys():
        raise ValueError(f"not a resolved {schema.__name__}")
    return schema(**{name: tuple(v) if settings[name].is_list else v for name, v in values.items()})
