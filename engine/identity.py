"""The numerics digest: within one value of it, equal requests get equal tokens wherever and however they run."""

import hashlib

from engine.model_config import ModelConfig
from kernels.backend import Backend, WeightFormat
from kvtransfer.layout import KVDtype


def numerics_digest(
    config: ModelConfig,
    backend: Backend,
    *,
    dtype: KVDtype,
    kv_dtype: KVDtype,
    quantization: WeightFormat = WeightFormat.AS_GIVEN,
) -> str:
    """Digests everything but the model's files that may change the bits of a result, in hexadecimal.

    Thread count, block size, batch, chunk and host are not in it: results must not depend on them.
    """
    facts = {
        "backend": backend.name,
        "abi_version": backend.abi_version,
        "instruction_set": backend.instruction_set,
        "dtype": dtype,
        "quantization": quantization.value,
        "kv_dtype": kv_dtype,
        "tensor_parallel": 1,
        "pipeline_parallel": 1,
        "rope": config.rope,
        "attention_scale": config.attention_scale,
        "rms_norm_eps": config.rms_norm_eps,
    }
    text = "\n".join(f"{name}={value!r}" for name, value in facts.items())
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
