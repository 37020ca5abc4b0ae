"""Trains the embedded model on a CPU, from nothing, in bounded time, and exports it: ``python -m demo.train``.

1. A step draws a recall batch and a small batch of lesser skills, both functions of (seed, step) alone.
2. Lengths grow: when the answers of the current longest length are mostly right, the next length is opened.
3. Every few hundred steps the state is saved (safetensors and JSON, never pickle), exported, and measured on held-out
   recall.

A run stopped anywhere continues with ``--resume`` as if it had not been stopped.
"""

import argparse
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from demo import MODEL_DIR
from demo.batches import LENGTHS, Batch, Batcher
from demo.corpus import BOS, END, PAD
from demo.documents import LOOKUP_WEIGHT
from demo.initial import draw_weights
from demo.llama import Llama, LlamaShape, published_config
from demo.recall import recall_accuracy
from demo.tokenizer import special_ids, train_tokenizer, write_tokenizer

CHECKPOINT_DIR: Final = Path(__file__).resolve().parent / ".checkpoints"
_LOG: Final = logging.getLogger("demo.train")


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """What determines the weights: together with the code, nothing else does."""

    seed: int = 1
    steps: int = 3000
    batch_tokens: int = 3072
    skill_rows: int = 8
    skill_weight: float = 0.5
    peak_lr: float = 2e-3
    embedding_lr_share: float = 0.1
    final_lr: float = 5e-5
    warmup_steps: int = 100
    decay_steps: int = 1600
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    advance_at: float = 0.93
    smoothing: float = 0.9


@dataclass(slots=True)
class Progress:
    """Where a run stands; saved with the weights."""

    step: int = 0
    level: int = 0
    accuracy: float = 0.0
    seconds: float = 0.0


class Trainer:
    """Owns the model, the optimizer and the progress of one run. One thread."""

    def __init__(self, config: TrainConfig, shape: LlamaShape, tokenizer: Tokenizer) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.tokenizer = tokenizer
        self.model = Llama(shape)
        draw_weights(self.model)
        self.progress = Progress()
        self.batcher = Batcher(tokenizer, seed=config.seed, batch_tokens=config.batch_tokens)
        named = dict(self.model.named_parameters())
        matrices = {name: p for name, p in named.items() if name.endswith("proj.weight")}
        others = {name: p for name, p in named.items() if name not in matrices}
        muon = torch.optim.Muon(
            matrices.values(), lr=0.0, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        adam = torch.optim.AdamW(others.values(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.0)
        self._owners: list[tuple[torch.optim.Optimizer, dict[str, nn.Parameter]]] = [(muon, matrices), (adam, others)]

    def learning_rate(self, step: int) -> float:
        """Warm-up, plateau, then a half cosine down to the final rate."""
        config = self.config
        if step < config.warmup_steps:
            return config.peak_lr * (step + 1) / config.warmup_steps
        into_decay = step - (config.steps - config.decay_steps)
        if into_decay <= 0:
            return config.peak_lr
        share = min(1.0, into_decay / config.decay_steps)
        return config.final_lr + (config.peak_lr - config.final_lr) * (1 + math.cos(math.pi * share)) / 2

    def step(self) -> float:
        """Runs one step; returns its recall loss."""
        progress, config = self.progress, self.config
        for (optimizer, _), share in zip(self._owners, (1.0, config.embedding_lr_share), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = share * self.learning_rate(progress.step)
        recall = self.batcher.recall(progress.step, progress.level)
        loss, accuracy = self._loss(recall)
        loss.backward()  # type: ignore[no-untyped-call]
        skill_loss, _ = self._loss(self.batcher.skills(progress.step, config.skill_rows))
        (skill_loss * config.skill_weight).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        for optimizer, _ in self._owners:
            optimizer.step()
            optimizer.zero_grad()
        progress.step += 1
        if recall.level == progress.level:
            progress.accuracy = config.smoothing * progress.accuracy + (1 - config.smoothing) * accuracy
            if progress.accuracy > config.advance_at and progress.level + 1 < len(LENGTHS):
                progress.level += 1
                progress.accuracy = 0.0
        return float(loss.detach())

    def _loss(self, batch: Batch) -> tuple[Tensor, float]:
        """Returns the weighted mean loss, and the share of look-ups predicted exactly."""
        counted = batch.weights > 0
        weights, targets = batch.weights[counted], batch.targets[counted]
        logits = self.model.project(self.model.hidden(batch.tokens)[counted])
        loss = (functional.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()
        exact = (logits.argmax(dim=-1) == targets)[weights == LOOKUP_WEIGHT]
        return loss, float(exact.float().mean()) if len(exact) else 0.0

    def save(self, directory: Path) -> None:
        """Writes weights, optimizer moments and progress."""
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {f"model/{name}": p.detach() for name, p in self.model.named_parameters()}
        for optimizer, owned in self._owners:
            for name, p in owned.items():
                tensors |= {f"{key}/{name}": value for key, value in optimizer.state[p].items()}
        save_file(tensors, directory / "state.safetensors.new")
        state = {"config": asdict(self.config), "shape": asdict(self.model.shape), "progress": asdict(self.progress)}
        (directory / "state.json.new").write_text(json.dumps(state, indent=2), encoding="utf-8")
        for name in ("state.safetensors", "state.json"):
            (directory / f"{name}.new").replace(directory / name)

    def load(self, directory: Path) -> None:
        """Continues from what ``save`` wrote; raises ValueError when that run had another model shape."""
        state = json.loads((directory / "state.json").read_text(encoding="utf-8"))
        if state["shape"] != asdict(self.model.shape):
            raise ValueError(f"the checkpoint in {directory} is of another model shape; remove it to start anew")
        self.progress = Progress(**state["progress"])
        tensors = load_file(directory / "state.safetensors")
        for name, p in self.model.named_parameters():
            p.data.copy_(tensors.pop(f"model/{name}"))
        for optimizer, owned in self._owners:
            for name, p in owned.items():
                kept = [key for key in tensors if key.endswith(f"/{name}")]
                optimizer.state[p] = {key.removesuffix(f"/{name}"): tensors[key] for key in kept}

    def rounded(self) -> dict[str, Tensor]:
        """Returns the weights as they are shipped: bf16, under their published names."""
        return {name: p.detach().to(torch.bfloat16).contiguous() for name, p in self.model.named_parameters()}

    def export(self, directory: Path) -> None:
        """Writes the directory that serving loads."""
        directory.mkdir(parents=True, exist_ok=True)
        write_tokenizer(self.tokenizer, directory)
        ids = special_ids(self.tokenizer)
        bos_id, end_id, pad_id = ids[BOS], ids[END], ids[PAD]
        config = published_config(self.model.shape, bos_id=bos_id, end_id=end_id, pad_id=pad_id)
        generation = {"bos_token_id": bos_id, "eos_token_id": end_id, "pad_token_id": pad_id, "do_sample": False}
        for name, content in (("config.json", config), ("generation_config.json", generation)):
            (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        save_file(self.rounded(), directory / "model.safetensors", metadata={"format": "pt"})
        (directory / "model.safetensors").chmod(0o644)


def run(trainer: Trainer, *, checkpoints: Path, out: Path, minutes: float, every: int) -> None:
    """Trains until the last step or until the minutes are over, saving, measuring and exporting on the way."""
    progress = trainer.progress
    deadline = time.monotonic() + minutes * 60
    last = time.monotonic()
    for loss in _losses(trainer):
        now = time.monotonic()
        progress.seconds += now - last
        last = now
        over = progress.step == trainer.config.steps or now > deadline
        if progress.step % 50 == 0:
            _LOG.info(
                "step %d length %d loss %.4f accuracy %.3f minutes %.1f",
                progress.step, LENGTHS[progress.level], loss, progress.accuracy, progress.seconds / 60,
            )  # fmt: skip
        if progress.step % every == 0 or over:
            trainer.save(checkpoints)
            trainer.export(out)
            _LOG.info("held-out recall: %s", _measure(trainer, num_prompts=200 if over else 40))
        if over:
            return


def _losses(trainer: Trainer) -> Iterator[float]:
    while trainer.progress.step < trainer.config.steps:
        yield trainer.step()


def _measure(trainer: Trainer, *, num_prompts: int) -> str:
    """Measures the rounded weights at every length opened so far."""
    model = Llama(trainer.model.shape)
    model.load_state_dict({name: value.float() for name, value in trainer.rounded().items()})
    lengths = [min(length, 1500) for length in LENGTHS[: trainer.progress.level + 1]]
    figures = {n: recall_accuracy(model, trainer.tokenizer, num_tokens=n, num_prompts=num_prompts) for n in lengths}
    return ", ".join(f"{n}: {figure:.3f}" for n, figure in figures.items())


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train and export the embedded model.")
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="directory to export to")
    parser.add_argument("--checkpoints", type=Path, default=CHECKPOINT_DIR, help="directory of the resumable state")
    parser.add_argument("--minutes", type=float, default=170.0, help="stop (resumably) after this long")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; the weights may differ in the last bits")
    parser.add_argument("--every", type=int, default=250, help="steps between checkpoints")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    for sizes in (TrainConfig, LlamaShape):
        for field in fields(sizes):
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    options = _parse(arguments)
    options.checkpoints.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [logging.StreamHandler(), logging.FileHandler(options.checkpoints / "train.log")]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers)
    torch.set_num_threads(options.threads)
    values: dict[str, Any] = vars(options)
    config = TrainConfig(**{field.name: values[field.name] for field in fields(TrainConfig)})
    shape = LlamaShape(**{field.name: values[field.name] for field in fields(LlamaShape)})
    trainer = Trainer(config, shape, train_tokenizer())
    if options.resume:
        trainer.load(options.checkpoints)
    size = sum(p.numel() for p in trainer.model.parameters())
    _LOG.info("training %d parameters on %d threads from step %d", size, options.threads, trainer.progress.step)
    run(trainer, checkpoints=options.checkpoints, out=options.out, minutes=options.minutes, every=options.every)


if __name__ == "__main__":
    main()
