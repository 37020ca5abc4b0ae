"""The embedded model: a tiny Llama that recalls facts from its context, so that a first run downloads nothing.

Also how a setting names a model, this one or another, so that every process reads the same directory and says the same
name. Nothing here reads a file.
"""

from pathlib import Path
from typing import Final, NamedTuple

MODEL_DIR: Final[Path] = Path(__file__).resolve().parent / "model"
"""The exported checkpoint: config, bf16 weights, tokenizer. Read-only for everyone but ``demo.train``."""

EMBEDDED: Final = "demo"
"""What a setting says to mean the embedded model, and what clients call it."""


class LocatedModel(NamedTuple):
    """What clients call a model, and the directory that holds it, which may not exist."""

    name: str
    directory: Path


def locate(model: str, served_model_name: str = "") -> LocatedModel:
    """The model that a setting names: the embedded one or a directory. Its own name may be overruled."""
    directory = MODEL_DIR if model == EMBEDDED else Path(model)
    own_name = EMBEDDED if model == EMBEDDED else directory.resolve().name
    return LocatedModel(served_model_name or own_name, directory)
