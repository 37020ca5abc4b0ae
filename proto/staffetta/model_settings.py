"""The small JSON files of a Hugging Face directory, read field by field with types and bounds; and the one reader of
generation_config.json, for gateway and engine alike. Never touches weights, nor the package that computes with them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from staffetta.identity import ModelRefusedError

MAX_FILE_BYTES: Final = 2**23

_FIX: Final = "use an unmodified model directory, or another model"
_READ: Final = frozenset({"eos_token_id", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty"})
_INERT: Final = frozenset(
    {"_from_model_config", "bos_token_id", "cache_implementation", "pad_token_id", "transformers_version"}
)


@dataclass(frozen=True, slots=True)
class Fields:
    """A JSON object's fields. `file` is for messages. Every reader raises ModelRefusedError by the field's name."""

    file: str
    values: Mapping[str, Any]

    def refuse(self, name: str, why: str) -> ModelRefusedError:
        """The refusal of a field's value; `why` says what is supported."""
        return ModelRefusedError(f"{self.file}: {name} is {self.values.get(name)!r}", why=why, fix=_FIX)

    def integer(self, name: str, *, low: int, high: int, default: int | None = None) -> int:
        """A whole number; the default where the file is silent, unless that is None."""
        value = self.values.get(name)
        value = default if value is None else value
        if type(value) is not int or not low <= value <= high:
            raise self.refuse(name, f"supported: whole numbers from {low} to {high}")
        return value

    def number(self, name: str, *, low: float, high: float, default: float | None = None) -> float:
        """A number; the default where the file is silent, unless that is None."""
        value = self.values.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.refuse(name, f"supported: numbers from {low:g} to {high:g}")
        return float(value)

    def flag(self, name: str) -> bool:
        """True or false; false where the file is silent."""
        value = self.values.get(name, False)
        if type(value) is not bool:
            raise self.refuse(name, "supported: true, false")
        return value

    def token_ids(self, name: str, *, vocab_size: int) -> tuple[int, ...]:
        """Token ids without repetition, written as a list or alone; none where the file is silent."""
        value = self.values.get(name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(type(token) is not int or not 0 <= token < vocab_size for token in ids):
            raise self.refuse(name, f"supported: token ids below vocab_size {vocab_size}, alone or in a list")
        return tuple(dict.fromkeys(ids))


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """What generation_config.json asks for where a request is silent; None, or no id, where it is silent too.

    `temperature` is 0 where the file turns sampling off. `unsupported` names its fields that have no effect here, for
    the log.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    eos_token_ids: tuple[int, ...] = ()
    unsupported: tuple[str, ...] = ()


def read_fields(path: Path) -> Fields:
    """The object in `path`, without fields when there is no such file. Raises ModelRefusedError."""
    if not path.is_file():
        return Fields(path.name, {})
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ModelRefusedError(f"{path.name} is too large", why=f"the bound is {MAX_FILE_BYTES} bytes", fix=_FIX)
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelRefusedError(f"{path.name} cannot be read", why="it is not JSON", fix=_FIX) from error
    if not isinstance(value, dict):
        raise ModelRefusedError(f"{path.name} holds no fields", why="it must be a JSON object", fix=_FIX)
    return Fields(path.name, value)


def read_generation_defaults(directory: Path, *, vocab_size: int) -> GenerationDefaults:
    """Reads generation_config.json, which may be absent. Raises ModelRefusedError for a value out of bounds."""
    fields = read_fields(directory / "generation_config.json")
    values = fields.values
    temperature = top_k = top_p = repetition_penalty = None
    if values.get("temperature") is not None:
        temperature = fields.number("temperature", low=0.0, high=2.0)
    if "do_sample" in values and not fields.flag("do_sample"):
        temperature = 0.0
    if values.get("top_k") is not None:
        top_k = fields.integer("top_k", low=0, high=2**22)
    if values.get("top_p") is not None:
        top_p = fields.number("top_p", low=1e-6, high=1.0)
    if values.get("repetition_penalty") is not None:
        repetition_penalty = fields.number("repetition_penalty", low=1e-6, high=2.0)
    unsupported = (
        name
        for name, value in values.items()
        if name not in _READ | _INERT and value is not None and value is not False
    )
    return GenerationDefaults(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        eos_token_ids=fields.token_ids("eos_token_id", vocab_size=vocab_size),
        unsupported=tuple(sorted(unsupported)),
    )
