"""What a Hugging Face Llama directory says about its model, as one frozen value. No torch.

Every field that could change a result is read, or the model is refused by that field's name; nothing is ignored in
silence. Fields known to say nothing about inference are listed here. The rest may only be null or false.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.compressed_tensors import Compression, parse_compression
from kernels.rope import LinearScaling, Llama3Scaling, Rope
from kvtransfer.layout import KVDtype, KVGroup, KVLayout
from staffetta.exits import ModelNotFoundError
from staffetta.model_settings import Fields, read_fields, read_generation_defaults

ARCHITECTURE = "LlamaForCausalLM"

_ROPE_FIELDS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
}


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_READ_FIELDS = _names(
    "architectures model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim hidden_act rms_norm_eps rope_theta rope_scaling rope_parameters "
    "max_position_embeddings attention_bias mlp_bias tie_word_embeddings eos_token_id quantization_config"
)
# Training, bookkeeping, how other programs load or print; dtype says how the weights are stored, as their files do.
_INERT_FIELDS = _names(
    "_name_or_path _attn_implementation_autoset attention_dropout bos_token_id chunk_size_feed_forward dtype "
    "id2label initializer_range label2id pad_token_id pretraining_tp problem_type return_dict torch_dtype "
    "transformers_version unsloth_version use_cache"
)

_FIX = f"use an unmodified {ARCHITECTURE} directory, or another model"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One Llama model. Counts are per model, not per rank; `max_position_embeddings` bounds prompt and output
    together."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: Rope
    max_position_embeddings: int
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    compression: Compression = Compression.NONE

    @classmethod
    def from_directory(cls, directory: Path) -> "ModelConfig":
        """Reads config.json and, where present, generation_config.json.

        Raises ModelNotFoundError when there is no config.json, ModelRefusedError for a model that would not be computed
        exactly as it says.
        """
        if not (directory / "config.json").is_file():
            raise ModelNotFoundError(
                "MODEL_NOT_FOUND", f"{directory} has no config.json", why="it is not a model directory", fix=_FIX
            )
        return _parse(directory)

    @property
    def attention_scale(self) -> float:
        """Factor of the attention logits."""
        return 1.0 / math.sqrt(self.head_dim)

    def kv_layout(self, *, block_size: int, dtype: KVDtype, model_digest: str) -> KVLayout:
        """The bytes of a pool for this model: one group, every layer attends to everything."""
        if not 1 <= block_size <= 1024:
            raise ValueError(f"block_size is {block_size}, needs 1 to 1024")
        group = KVGroup(
            kind="full",
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            block_size=block_size,
            dtype=dtype,
        )
        return KVLayout(model_digest, (group,))


def resolve_dtype(dtype: Literal["auto", "float32", "bfloat16"]) -> KVDtype:
    """The type of computation and KV that a setting stands for: auto is float32 on CPU."""
    return "float32" if dtype == "auto" else dtype


def _parse(directory: Path) -> ModelConfig:
    config = read_fields(directory / "config.json")
    _check_architecture(config)
    hidden_size = config.integer("hidden_size", low=1, high=2**17)
    num_heads = config.integer("num_attention_heads", low=1, high=1024)
    num_kv_heads = config.integer("num_key_value_heads", low=1, high=num_heads, default=num_heads)
    if num_heads % num_kv_heads:
        raise config.refuse("num_key_value_heads", f"it must divide num_attention_heads {num_heads}")
    if config.values.get("head_dim") is None and hidden_size % num_heads:
        raise config.refuse("head_dim", f"hidden_size {hidden_size} is no multiple of num_attention_heads {num_heads}")
    head_dim = config.integer("head_dim", low=2, high=1024, default=hidden_size // num_heads)
    if head_dim % 2:
        raise config.refuse("head_dim", "rotary embedding needs it even")
    max_positions = config.integer("max_position_embeddings", low=1, high=2**24)
    vocab_size = config.integer("vocab_size", low=1, high=2**22)
    generation = read_generation_defaults(directory, vocab_size=vocab_size)
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size", low=1, high=2**20),
        num_layers=config.integer("num_hidden_layers", low=1, high=1024),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=config.number("rms_norm_eps", low=1e-12, high=1e-2),
        rope=_parse_rope(config),
        max_position_embeddings=max_positions,
        attention_bias=config.flag("attention_bias"),
        mlp_bias=config.flag("mlp_bias"),
        tie_word_embeddings=config.flag("tie_word_embeddings"),
        eos_token_ids=generation.eos_token_ids or config.token_ids("eos_token_id", vocab_size=vocab_size),
        compression=parse_compression(config),
    )


def _check_architecture(config: Fields) -> None:
    if config.values.get("architectures") != [ARCHITECTURE]:
        raise config.refuse("architectures", f"supported: [{ARCHITECTURE!r}]")
    if config.values.get("model_type", "llama") != "llama":
        raise config.refuse("model_type", "supported: 'llama'")
    if config.values.get("hidden_act", "silu") != "silu":
        raise config.refuse("hidden_act", "supported: 'silu'")
    for name, value in config.values.items():
        if name not in _READ_FIELDS | _INERT_FIELDS and value is not None and value is not False:
            raise config.refuse(name, f"a {ARCHITECTURE} here has no such field, and dropping it may change results")


def _parse_rope(config: Fields) -> Rope:
    """Reads the angles from `rope_parameters`, or from `rope_theta` and `rope_scaling`, as older files have them."""
    name = "rope_parameters" if config.values.get("rope_parameters") is not None else "rope_scaling"
    if name == "rope_parameters" and config.values.get("rope_scaling") is not None:
        raise config.refuse("rope_scaling", "rope_parameters is there as well; keep one of them")
    parameters = config.values.get(name)
    if parameters is None:
        parameters = {}
    if not isinstance(parameters, dict):
        raise config.refuse(name, "supported: an object, or null")
    rope = Fields(f"config.json: {name}", parameters)
    # 10,000 is what a file means that says nothing: the value of the paper and of the first Llama.
    theta = config.number("rope_theta", low=1.0, high=1e12, default=10_000.0)
    theta = rope.number("rope_theta", low=1.0, high=1e12, default=theta)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_FIELDS:
        raise rope.refuse("rope_type" if "rope_type" in parameters else "type", f"supported: {', '.join(_ROPE_FIELDS)}")
    for field in parameters:
        if field not in _ROPE_FIELDS[kind] | {"rope_type", "type", "rope_theta"}:
            raise rope.refuse(field, f"rope type {kind!r} has no such field")
    if kind == "default":
        return Rope(theta)
    factor = rope.number("factor", low=1.0, high=1e6)
    if kind == "linear":
        return Rope(theta, LinearScaling(factor))
    low = rope.number("low_freq_factor", low=1e-6, high=1e6)
    high = rope.number("high_freq_factor", low=1e-6, high=1e6)
    if high <= low:
        raise rope.refuse("high_freq_factor", f"it must be above low_freq_factor {low:g}")
    original = rope.integer("original_max_position_embeddings", low=1, high=2**24)
    scaling = Llama3Scaling(
        factor=factor, low_freq_factor=low, high_freq_factor=high, original_max_position_embeddings=original
    )
    return Rope(theta, scaling)
