"""What integers for weights cost in accuracy: `python -m tests.bars.quantization`. Bar: recall within 2 % of `none`.

Recall is that of the embedded model on held-out prompts of 64 to 1,500 tokens, each answer scored in one pass: it
counts where every token of it, and the end, is the likeliest. A random model shows how far log-probabilities move where
nothing was learnt that could correct them.
"""

import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal, get_args

from safetensors.torch import save_file
from tokenizers import Tokenizer

from demo import MODEL_DIR
from demo.corpus import END
from demo.evaluate import LENGTHS
from demo.recall import frame, held_out_prompts
from engine.model_config import ModelConfig
from engine.request import PromptToken, RequestId
from engine.runner import ModelRunner, load_runner
from engine.step import Score, SequenceSlice
from kvtransfer.layout import BlockId
from tests.bars.report import parse_size, print_table, verdict
from tests.engine.model_directory import make_config_directory, make_weights

Quantization = Literal["none", "int8", "int8-weight", "int4"]
QUANTIZATIONS: Final[tuple[Quantization, ...]] = get_args(Quantization)
MAX_LOST: Final = 0.02
_BLOCK_SIZE: Final = 16
_NUM_BLOCKS: Final = 128
_RANDOM_TOKENS: Final = 512


def make_runner(directory: Path, quantization: Quantization) -> ModelRunner:
    """A float32 runner on one thread, over a pool for one sequence."""
    config = ModelConfig.from_directory(directory)
    layout = config.kv_layout(block_size=_BLOCK_SIZE, dtype="float32", model_digest="measured")
    pool = memoryview(bytearray(layout.page_bytes * _NUM_BLOCKS))
    return load_runner(
        directory,
        config,
        layout,
        pool=pool,
        num_blocks=_NUM_BLOCKS,
        threads=1,
        device="cpu",
        quantization=quantization,
    )


def score(runner: ModelRunner, token_ids: Sequence[int]) -> tuple[PromptToken, ...]:
    """How likely each token but the first is after those before it, with the likeliest in its place."""
    blocks = tuple(BlockId(block) for block in range(_NUM_BLOCKS))
    targets = Score(tuple(token_ids[1:]), num_alternatives=1)
    (result,) = runner.run((SequenceSlice(RequestId("scored"), tuple(token_ids[:-1]), 0, blocks, score=targets),))
    return result.prompt_tokens


def is_likeliest(token: PromptToken) -> bool:
    """Whether greedy decoding would have drawn it."""
    return token.top_logprobs[0][0] == token.token_id


def recall(runner: ModelRunner, prompts: Sequence[tuple[list[int], int]]) -> float:
    """Share of prompts answered exactly; of each, its tokens with the answer, and how many of them are the answer."""
    return statistics.mean(all(map(is_likeliest, score(runner, ids)[-size:])) for ids, size in prompts)


def encode(tokenizer: Tokenizer, *, length: int, count: int) -> list[tuple[list[int], int]]:
    """Held-out prompts of about `length` tokens, answered, and the number of tokens of the answer and its end."""
    samples = held_out_prompts(tokenizer, num_tokens=length, num_prompts=count, seed=7)
    return [
        (
            tokenizer.encode(frame(sample) + sample.answer + END, add_special_tokens=False).ids,
            len(tokenizer.encode(sample.answer + END, add_special_tokens=False).ids),
        )
        for sample in samples
    ]


def make_random_model(directory: Path) -> Path:
    """A model of two million weights whose layers neither grow nor shrink what goes through them."""
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 4}
    make_config_directory(directory, **shape, head_dim=64, max_position_embeddings=1024)
    weights = make_weights(directory)
    scaled = {name: w if w.dim() == 1 else w / w.std() / w.shape[1] ** 0.5 for name, w in weights.items()}
    save_file(scaled, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def logprob_errors(directory: Path) -> list[list[object]]:
    """A row for each quantization: root mean square of what it changes a log-probability by, and other likeliest."""
    vocab_size = ModelConfig.from_directory(directory).vocab_size
    token_ids = [(i * i * 31 + i * 7) % vocab_size for i in range(_RANDOM_TOKENS + 1)]
    exact = score(make_runner(directory, "none"), token_ids)
    rows: list[list[object]] = []
    for quantization in QUANTIZATIONS[1:]:
        scored = score(make_runner(directory, quantization), token_ids)
        pairs = list(zip(exact, scored, strict=True))
        error = statistics.fmean((one.logprob - other.logprob) ** 2 for one, other in pairs) ** 0.5
        others = statistics.mean(one.top_logprobs[0][0] != other.top_logprobs[0][0] for one, other in pairs)
        rows.append([quantization, error, others])
    return rows


def main(argv: Sequence[str]) -> int:
    """Measures and prints both tables; returns the exit code."""
    size = parse_size(__doc__, argv, short=50, full=200)
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    prompts = [encode(tokenizer, length=length, count=size.count) for length in LENGTHS]
    found = {}
    for quantization in QUANTIZATIONS:
        runner = make_runner(MODEL_DIR, quantization)
        found[quantization] = [recall(runner, each) for each in prompts]
    headers = ("quantization", *(f"{length} tokens" for length in LENGTHS))
    print_table(
        f"exact recall, {size.count} prompts each", headers, [[name, *shares] for name, shares in found.items()]
    )
    with tempfile.TemporaryDirectory() as directory:
        headers = ("quantization", "logprob error", "other likeliest")
        print_table("a random model", headers, logprob_errors(make_random_model(Path(directory))))
    lost = {
        name: max(exact - share for exact, share in zip(found["none"], shares, strict=True))
        for name, shares in found.items()
    }
    return verdict([f"{name} loses {share:.1%} of recall" for name, share in lost.items() if share > MAX_LOST])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
