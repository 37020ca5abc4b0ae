"""A model directory's identity: the digest of what is in its files, equal for gateway and workers, with no tensor
library.

Identity is content: two directories of different names serve the same model when their digests are equal. Nothing here
interprets the files beyond the list of weight files, and no name found inside a file is joined to a path unchecked.
"""

import hashlib
import json
import re
from pathlib import Path

from staffetta.exits import ModelNotFoundError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_INDEX_BYTES = 64 * 2**20

_METADATA_NAMES = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    INDEX_NAME,
)
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,126}\.safetensors")
_FIX = "download the model directory again, whole: config.json, tokenizer.json and its .safetensors files"


class ModelRefusedError(ModelNotFoundError):
    """The model is there but cannot be served as it is; `what` names file, field and value, `why` what is supported."""

    def __init__(self, what: str, *, why: str, fix: str) -> None:
        super().__init__("MODEL_REFUSED", what, why=why, fix=fix)


def model_digest(directory: Path) -> str:
    """Digests weights, tokenizer and config, in hexadecimal: BLAKE2b over each file's name and content digest.

    Files in the order of their names; an optional file counts when it is there. Reads every byte, in small pieces, at
    about 0.6 GB/s. Raises ModelNotFoundError where there is no model, ModelRefusedError for a bad list of weight files.
    """
    digest = hashlib.blake2b(digest_size=32)
    for name in model_files(directory):
        with (directory / name).open("rb") as file:
            content = hashlib.file_digest(file, hashlib.blake2b)
        digest.update(f"{name}\0{content.hexdigest()}\n".encode())
    return digest.hexdigest()


def model_files(directory: Path) -> tuple[str, ...]:
    """Names the files that the digest reads, sorted: the weights', and of the others those that are there.

    Raises ModelNotFoundError where there is no model, ModelRefusedError for a bad list of weight files.
    """
    if not (directory / "config.json").is_file():
        raise ModelNotFoundError(
            "MODEL_NOT_FOUND", f"{directory} has no config.json", why="it is not a model directory", fix=_FIX
        )
    present = {name for name in _METADATA_NAMES if (directory / name).is_file()}
    return tuple(sorted(present.union(weight_names(directory))))


def weight_names(directory: Path) -> tuple[str, ...]:
    """Names the files that hold the weights, sorted: those of the shard index, else the single file.

    Raises ModelNotFoundError when one is missing, ModelRefusedError for an index that is malformed or names anything
    but plain `.safetensors` files of this directory.
    """
    has_index = (directory / INDEX_NAME).is_file()
    names = sorted(set(shard_map(directory).values())) if has_index else [SINGLE_NAME]
    for name in names:
        if not (directory / name).is_file():
            why = f"{INDEX_NAME} names it" if has_index else f"there is no {INDEX_NAME} to name others"
            raise ModelNotFoundError("MODEL_NOT_FOUND", f"{directory} has no {name}", why=why, fix=_FIX)
    return tuple(names)


def shard_map(directory: Path) -> dict[str, str]:
    """The shard index: tensor name to file name, each checked to be plain. Raises ModelRefusedError."""
    path = directory / INDEX_NAME
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise ModelRefusedError(f"{INDEX_NAME} is too large", why=f"the bound is {MAX_INDEX_BYTES} bytes", fix=_FIX)
    try:
        index = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelRefusedError(f"{INDEX_NAME} cannot be read", why="it is not JSON", fix=_FIX) from error
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise ModelRefusedError(f"{INDEX_NAME} has no weight_map", why="it places tensors in files", fix=_FIX)
    for tensor, name in shards.items():
        if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
            raise ModelRefusedError(
                f"{INDEX_NAME} places {tensor} in {name!r}",
                why="shards are plain .safetensors names in the model directory",
                fix=_FIX,
            )
    return shards
