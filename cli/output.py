"""Where a verb's words go: results to standard output, as text or as JSON; everything else to standard error."""

import json
import sys
from collections.abc import Mapping
from enum import Enum
from typing import Any


class Output(Enum):
    """The form of results."""

    TEXT = "text"
    JSON = "json"


def write(text: str) -> None:
    """A piece of a streamed result."""
    print(text, end="", flush=True)


def write_json(result: Mapping[str, Any]) -> None:
    """A result as one JSON object on one line."""
    print(json.dumps(result), flush=True)


def discard(_text: str) -> None:
    """For a streamed result that is written as a whole in the end."""


def say(text: str) -> None:
    """A line for the person at the terminal that is no result."""
    print(f"{'staffetta':<9} │ {text}", file=sys.stderr, flush=True)
