"""Finds the model before anything is started, so that a wrong name is told in milliseconds."""

from pathlib import Path
from typing import Final

from demo import EMBEDDED, locate
from staffetta.exits import ModelNotFoundError

_NEEDED: Final = ("config.json", "tokenizer.json")


def find_model(model: str) -> Path:
    """The directory of `model`: the embedded one, or a Hugging Face directory. Raises ModelNotFoundError."""
    path = locate(model).directory
    fix = f"staffetta serve {EMBEDDED}"
    if not path.is_dir():
        why = f"it is neither a directory nor {EMBEDDED!r}, and nothing is downloaded"
        raise ModelNotFoundError("MODEL_NOT_FOUND", f"there is no model {model!r}", why=why, fix=fix)
    missing = [name for name in _NEEDED if not (path / name).is_file()]
    if not any(path.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        why = f"it lacks {', '.join(missing)}"
        raise ModelNotFoundError("MODEL_INCOMPLETE", f"{model} is not a complete model directory", why=why, fix=fix)
    return path
