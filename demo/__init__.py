"""The embedded model: a tiny Llama that recalls facts from its context, so that a first run downloads nothing."""

from pathlib import Path
from typing import Final

MODEL_DIR: Final[Path] = Path(__file__).resolve().parent / "model"
"""The exported checkpoint: config, bf16 weights, tokenizer. Read-only for everyone but ``demo.train``."""
