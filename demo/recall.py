"""Measures exact recall of a training-form model at a given prompt length, on held-out records.

The reply is greedy; because it is compared as a whole, feeding the expected reply and asking whether every one of its
tokens (and the end) is the most likely one gives the same verdict as generating it, in one pass.
"""

from typing import Final

import torch
from tokenizers import Tokenizer

from demo.corpus import ASSISTANT, BOS, END, MAX_RECORDS, USER, RecallSample, held_out_recall
from demo.llama import Llama

_BATCH_TOKENS: Final = 16_384


def held_out_prompts(tokenizer: Tokenizer, *, num_tokens: int, num_prompts: int, seed: int = 0) -> list[RecallSample]:
    """Draws held-out prompts that are, chat frame included, 0.8 to 1.0 times ``num_tokens`` long."""
    chosen: list[RecallSample] = []
    for attempt in range(1000):
        low, high = max(1, num_tokens // 24), max(1, min(MAX_RECORDS, num_tokens // 13))
        samples = held_out_recall(seed * 1000 + attempt, 4 * num_prompts, min_records=low, max_records=high)
        encoded = tokenizer.encode_batch([frame(sample) for sample in samples], add_special_tokens=False)
        fitting = (s for s, e in zip(samples, encoded, strict=True) if 0.8 * num_tokens <= len(e.ids) <= num_tokens)
        chosen += fitting
        if len(chosen) >= num_prompts:
            return chosen[:num_prompts]
    raise ValueError(f"no prompts of about {num_tokens} tokens can be drawn")


def frame(sample: RecallSample) -> str:
    """Renders the prompt as the chat template does."""
    return f"{BOS}{USER}{sample.prompt}{END}{ASSISTANT}"


@torch.inference_mode()
def recall_accuracy(model: Llama, tokenizer: Tokenizer, *, num_tokens: int, num_prompts: int) -> float:
    """Returns the share of held-out prompts of about ``num_tokens`` tokens that the model answers exactly."""
    samples = held_out_prompts(tokenizer, num_tokens=num_tokens, num_prompts=num_prompts)
    rows_per_batch = max(1, _BATCH_TOKENS // num_tokens)
    right = 0
    for start in range(0, len(samples), rows_per_batch):
        batch = samples[start : start + rows_per_batch]
        rows = [tokenizer.encode(f"{frame(s)}{s.answer}{END}", add_special_tokens=False).ids for s in batch]
        tokens = torch.zeros((len(rows), max(map(len, rows))), dtype=torch.int64)
        for row, ids in enumerate(rows):
            tokens[row, : len(ids)] = torch.tensor(ids)
        hidden = model.hidden(tokens)
        for row, (ids, sample) in enumerate(zip(rows, batch, strict=True)):
            size = len(sample.answer) + 1
            predicted = model.project(hidden[row, len(ids) - size - 1 : len(ids) - 1]).argmax(dim=-1)
            right += predicted.tolist() == ids[-size:]
    return right / len(samples)
