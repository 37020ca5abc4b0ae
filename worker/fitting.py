"""Whether a worker's weights and KV pool fit the memory that it may take: told before any of it is taken."""

from math import prod

from engine.compressed_tensors import Compression
from engine.model_config import ModelConfig
from engine.models.llama import tensor_shapes
from engine.weights import TORCH_DTYPES
from kvtransfer.layout import KVDtype
from staffetta.config.schema import WorkerConfig
from staffetta.exits import DoesNotFitError
from worker.headroom import Headroom

_LINEAR_SUFFIX = "_proj.weight"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_QUANTIZED_BITS = {"int8": 8, "int8-weight": 8, "int4": 4}


def weight_bytes(model: ModelConfig, *, dtype: KVDtype, quantization: str) -> int:
    """What a model's weights take when they are ready, in memory or mapped: no less, since packing rounds sizes up.

    The copy of the head counts whoever asks it, or nobody: a worker with one thread, or a head that has none.
    Those of a checkpoint that is quantized already take what they take, whatever `quantization` is.
    """
    bits = 8 * TORCH_DTYPES[dtype].itemsize
    is_stored_as_int8 = model.compression is Compression.W8A8
    linear_bits = 8 if is_stored_as_int8 else _QUANTIZED_BITS.get(quantization, bits)
    sizes = {name: prod(shape) for name, shape in tensor_shapes(model).items()}
    of_layers = sum(size for name, size in sizes.items() if name.endswith(_LINEAR_SUFFIX))
    # A head that is the embedding is packed for itself, and every head once more in int8.
    of_head = sizes.setdefault(_HEAD, sizes[_EMBEDDING])
    others = sum(sizes.values()) - of_layers
    return (of_layers * linear_bits + others * bits) // 8 + of_head


def check_memory(
    config: WorkerConfig,
    *,
    num_blocks: int,
    page_bytes: int,
    num_weight_bytes: int,
    num_int4_bytes: int,
    left: Headroom,
) -> None:
    """Raises DoesNotFitError, with the fix, for a pool of no block, and where weights and pool exceed what is left.

    `num_int4_bytes` is what the weights would take with `--quantization int4`, or take already.
    """
    if num_blocks < 1:
        raise DoesNotFitError(
            "KV_POOL_TOO_SMALL",
            f"the KV pool of {config.kv_memory} bytes holds no block",
            why=f"one block of {config.block_size} tokens has {page_bytes} bytes",
            fix=f"--kv-memory {64 * page_bytes}",
        )
    why = f"{left.num_bytes} {left.why}"
    for_pool = left.num_bytes - num_weight_bytes
    if for_pool < page_bytes:
        quantize = "--quantization int4, " if num_int4_bytes + page_bytes <= left.num_bytes else ""
        raise DoesNotFitError(
            "MODEL_TOO_LARGE",
            f"the weights have {num_weight_bytes} bytes, one KV block {page_bytes}",
            why=why,
            fix=f"{quantize}a smaller model, or more memory",
        )
    if num_blocks * page_bytes > for_pool:
        raise DoesNotFitError(
            "KV_POOL_TOO_LARGE",
            f"the KV pool has {num_blocks * page_bytes} bytes, the weights {num_weight_bytes}",
            why=why,
            fix=f"--num-blocks {max(1, for_pool // 2 // page_bytes)}",
        )
