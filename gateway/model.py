"""The served model as the gateway knows it: names, limits, defaults, tokenizer and template, read once from its
directory.

Reads the small files only; weights are the workers' business, their digest is what both sides compare.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import demo
from gateway.template import ChatTemplate
from gateway.text import Text
from staffetta import validate
from staffetta.config.schema import ModelConfig
from staffetta.errors import InvalidRequestError
from staffetta.exits import ModelNotFoundError, UsageError
from staffetta.identity import model_digest
from staffetta.validate import Limits

_EMBEDDED: Final = "demo"
_FIX: Final = "download the model directory again, whole: config.json, tokenizer.json and its .safetensors files"


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What applies where a request says nothing, from the model's generation_config. Temperature 0 is greedy."""

    temperature: float
    top_p: float
    top_k: int


@dataclass(frozen=True, slots=True)
class Model:
    """The one served model. `created` is the time its files were written, in seconds since 1970."""

    name: str
    digest: str
    limits: Limits
    eos_token_ids: frozenset[int]
    defaults: SamplingDefaults
    text: Text
    created: int


def load_model(config: ModelConfig) -> Model:
    """Reads the model that `config` names. Reads all its weights once, for the digest.

    Raises ModelNotFoundError when it is not there or not whole, UsageError for a setting that does not fit it.
    """
    directory = demo.MODEL_DIR if config.model == _EMBEDDED else Path(config.model)
    name = config.served_model_name or (_EMBEDDED if config.model == _EMBEDDED else directory.resolve().name)
    try:
        validate.check_name(name, param="served_model_name")
    except InvalidRequestError as error:
        raise UsageError(
            "BAD_MODEL_NAME", error.message, why="clients ask for models by it", fix="--served-model-name NAME"
        ) from error
    digest = model_digest(directory)
    shape = _read_json(directory / "config.json")
    generation = _read_json(directory / "generation_config.json")
    vocab_size = _positive(shape, "vocab_size", directory)
    own_length = _positive(shape, "max_position_embeddings", directory)
    if not 0 <= config.max_model_len <= own_length:
        raise UsageError(
            "BAD_MAX_MODEL_LEN",
            f"max_model_len is {config.max_model_len}",
            why=f"the model {name} has {own_length} positions",
            fix=f"--max-model-len {own_length}",
        )
    return Model(
        name=name,
        digest=digest,
        limits=Limits(vocab_size=vocab_size, max_model_len=config.max_model_len or own_length),
        eos_token_ids=_eos_token_ids(generation) or _eos_token_ids(shape),
        defaults=_defaults(generation),
        text=_read_text(directory),
        created=int((directory / "config.json").stat().st_mtime),
    )


def _read_text(directory: Path) -> Text:
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ModelNotFoundError(
            "TOKENIZER_NOT_FOUND", f"{directory} has no tokenizer.json", why="the gateway tokenizes", fix=_FIX
        )
    settings = _read_json(directory / "tokenizer_config.json")
    source = settings.get("chat_template")
    own_file = directory / "chat_template.jinja"
    if own_file.is_file():
        source = own_file.read_text(encoding="utf-8")
    template: ChatTemplate | None = None
    if isinstance(source, str):
        bos_token, eos_token = _token(settings.get("bos_token")), _token(settings.get("eos_token"))
        try:
            template = ChatTemplate(source, bos_token=bos_token, eos_token=eos_token)
        except ValueError as error:
            raise ModelNotFoundError(
                "MODEL_REFUSED", f"{directory} has a chat template that does not parse", why=str(error), fix=_FIX
            ) from error
    try:
        return Text(path, template)
    except Exception as error:  # the tokenizer library raises nothing narrower
        raise ModelNotFoundError("MODEL_REFUSED", f"{path} cannot be used", why=str(error), fix=_FIX) from error


def _defaults(generation: dict[str, object]) -> SamplingDefaults:
    """A model that says `do_sample: false` is meant to be greedy."""
    temperature = 0.0 if generation.get("do_sample") is False else 1.0
    return SamplingDefaults(
        temperature=_number(generation.get("temperature"), temperature),
        top_p=_number(generation.get("top_p"), 1.0),
        top_k=int(_number(generation.get("top_k"), 0)),
    )


def _read_json(path: Path) -> dict[str, object]:
    """The object in `path`, empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelNotFoundError("MODEL_REFUSED", f"{path} cannot be read", why="it is not JSON", fix=_FIX) from error
    if not isinstance(content, dict):
        raise ModelNotFoundError("MODEL_REFUSED", f"{path} cannot be used", why="it holds no JSON object", fix=_FIX)
    return content


def _positive(shape: dict[str, object], key: str, directory: Path) -> int:
    value = shape.get(key)
    if not isinstance(value, int) or value < 1:
        raise ModelNotFoundError(
            "MODEL_REFUSED", f"{directory}/config.json says {key} is {value!r}", why="it must be 1 or more", fix=_FIX
        )
    return value


def _eos_token_ids(settings: dict[str, object]) -> frozenset[int]:
    value = settings.get("eos_token_id")
    ids = value if isinstance(value, list) else [value]
    return frozenset(token_id for token_id in ids if isinstance(token_id, int))


def _number(value: object, default: float) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else default


def _token(value: object) -> str:
    """A token's text: the file holds it plainly, or as an object with its flags."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""
