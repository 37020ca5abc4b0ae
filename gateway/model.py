"""The served model as the gateway knows it: names, limits, defaults, tokenizer and template, read once from its
directory.

Reads the small files only; weights are the workers' business, their digest is what both sides compare.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import demo
from gateway.template import ChatTemplate
from gateway.text import Text
from staffetta import validate
from staffetta.cache_dir import open_cache
from staffetta.config.schema import ModelConfig
from staffetta.digest_memo import remembered_digest
from staffetta.errors import InvalidRequestError
from staffetta.exits import ModelNotFoundError, UsageError
from staffetta.model_settings import GenerationDefaults, read_fields, read_generation_defaults
from staffetta.validate import Limits

_FIX: Final = "download the model directory again, whole: config.json, tokenizer.json and its .safetensors files"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What applies where a request says nothing, from the model's generation_config. Temperature 0 is greedy."""

    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float


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


def load_model(config: ModelConfig, *, digest: str = "") -> Model:
    """Reads the model that `config` names. Reads all its weights once, for the digest, unless it is remembered, or
    `digest` gives it.

    Raises ModelNotFoundError when it is not there or not whole, UsageError for a setting that does not fit it.
    """
    name, directory = demo.locate(config.model, config.served_model_name)
    try:
        validate.check_name(name, param="served_model_name")
    except InvalidRequestError as error:
        raise UsageError(
            "BAD_MODEL_NAME", error.message, why="clients ask for models by it", fix="--served-model-name NAME"
        ) from error
    digest = digest or remembered_digest(directory, open_cache(config.cache_dir, model=directory))
    shape = read_fields(directory / "config.json")
    vocab_size = shape.integer("vocab_size", low=1, high=2**22)
    own_length = shape.integer("max_position_embeddings", low=1, high=2**24)
    generation = read_generation_defaults(directory, vocab_size=vocab_size)
    if generation.unsupported:
        log.warning("generation_config.json: %s: of no effect here", ", ".join(generation.unsupported))
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
        eos_token_ids=frozenset(generation.eos_token_ids or shape.token_ids("eos_token_id", vocab_size=vocab_size)),
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
    settings = read_fields(directory / "tokenizer_config.json").values
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


def _defaults(generation: GenerationDefaults) -> SamplingDefaults:
    """Where the file is silent too, nothing is cut off and the model's own distribution is drawn from."""
    return SamplingDefaults(
        temperature=1.0 if generation.temperature is None else generation.temperature,
        top_p=1.0 if generation.top_p is None else generation.top_p,
        top_k=generation.top_k or 0,
        repetition_penalty=1.0 if generation.repetition_penalty is None else generation.repetition_penalty,
    )


def _token(value: object) -> str:
    """A token's text: the file holds it plainly, or as an object with its flags."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""
