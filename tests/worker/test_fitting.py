"""A worker's weights and pool are held against memory: what does not fit is told with value, limit and fix."""

from dataclasses import replace
from functools import partial

import pytest

from demo import MODEL_DIR
from engine.compressed_tensors import Compression
from engine.model_config import ModelConfig
from kvtransfer.layout import KVDtype
from staffetta.config.schema import PrefillConfig
from staffetta.exits import DoesNotFitError
from worker.fitting import check_memory, weight_bytes
from worker.headroom import Headroom

MODEL = ModelConfig.from_directory(MODEL_DIR)
LEFT = Headroom(1000, "bytes are left of the 5000 that control group /g may take")


def check(num_blocks: int, *, num_weight_bytes: int = 400, num_int4_bytes: int = 400) -> None:
    check_memory(
        PrefillConfig(kv_memory=99),
        num_blocks=num_blocks,
        page_bytes=100,
        num_weight_bytes=num_weight_bytes,
        num_int4_bytes=num_int4_bytes,
        left=LEFT,
    )


def test_what_fits_to_the_last_byte_is_taken() -> None:
    check(6)
    check(1, num_weight_bytes=900)


def test_weights_and_pool_must_fit_together() -> None:
    with pytest.raises(DoesNotFitError) as refused:
        check(7)
    assert str(refused.value) == (
        "error[KV_POOL_TOO_LARGE]: the KV pool has 700 bytes, the weights 400\n"
        "  1000 bytes are left of the 5000 that control group /g may take\n"
        "  fix: --num-blocks 3"
    )
    check(3)


def test_weights_beyond_what_is_left_are_named_rather_than_the_pool() -> None:
    with pytest.raises(DoesNotFitError) as refused:
        check(1, num_weight_bytes=901, num_int4_bytes=900)
    assert str(refused.value) == (
        "error[MODEL_TOO_LARGE]: the weights have 901 bytes, one KV block 100\n"
        "  1000 bytes are left of the 5000 that control group /g may take\n"
        "  fix: --quantization int4, a smaller model, or more memory"
    )


def test_int4_is_offered_only_where_it_would_fit() -> None:
    with pytest.raises(DoesNotFitError) as refused:
        check(1, num_weight_bytes=2000, num_int4_bytes=901)
    assert refused.value.fix == "a smaller model, or more memory"


def fix_for(model: ModelConfig, quantization: str) -> str:
    """What is told of weights that have one byte too many."""
    count = partial(weight_bytes, model, dtype="bfloat16")
    num_weight_bytes = count(quantization=quantization)
    with pytest.raises(DoesNotFitError) as refused:
        check_memory(
            PrefillConfig(),
            num_blocks=1,
            page_bytes=100,
            num_weight_bytes=num_weight_bytes,
            num_int4_bytes=count(quantization="int4"),
            left=Headroom(num_weight_bytes + 99, "bytes of memory are available"),
        )
    return refused.value.fix


@pytest.mark.parametrize("quantization", ["none", "int8", "int8-weight"])
def test_int4_is_offered_for_weights_that_it_makes_smaller(quantization: str) -> None:
    assert fix_for(MODEL, quantization) == "--quantization int4, a smaller model, or more memory"


def test_int4_is_not_offered_where_it_is_given() -> None:
    assert fix_for(MODEL, "int4") == "a smaller model, or more memory"


@pytest.mark.parametrize("quantization", ["none", "int4"])
def test_int4_is_not_offered_for_a_checkpoint_that_is_quantized_already(quantization: str) -> None:
    assert fix_for(replace(MODEL, compression=Compression.W8A8), quantization) == "a smaller model, or more memory"


def test_a_pool_of_no_block_is_refused_whatever_is_left() -> None:
    with pytest.raises(DoesNotFitError, match="the KV pool of 99 bytes holds no block") as refused:
        check(0)
    assert (refused.value.name, refused.value.fix) == ("KV_POOL_TOO_SMALL", "--kv-memory 6400")


@pytest.mark.parametrize(
    ("dtype", "quantization", "bits", "layer_bits"),
    [
        ("float32", "none", 32, 32),
        ("bfloat16", "none", 16, 16),
        ("bfloat16", "int8", 16, 8),
        ("float32", "int8-weight", 32, 8),
        ("bfloat16", "int4", 16, 4),
    ],
)
def test_layers_count_as_they_are_stored_and_the_rest_as_the_model_computes(
    dtype: KVDtype, quantization: str, bits: int, layer_bits: int
) -> None:
    hidden, inner, vocabulary = MODEL.hidden_size, MODEL.intermediate_size, MODEL.vocab_size
    query, kv = MODEL.num_heads * MODEL.head_dim, MODEL.num_kv_heads * MODEL.head_dim
    layers = MODEL.num_layers * hidden * (2 * query + 2 * kv + 3 * inner)
    others = 2 * vocabulary * hidden + (2 * MODEL.num_layers + 1) * hidden  # a tied head is packed beside the embedding
    copy = vocabulary * hidden  # of the head, in int8
    counted = partial(weight_bytes, dtype=dtype, quantization=quantization)
    assert counted(MODEL) == counted(replace(MODEL, tie_word_embeddings=False))
    assert counted(MODEL) == (layers * layer_bits + others * bits) // 8 + copy
