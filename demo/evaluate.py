"""Prints what the exported model can do, as a table: ``python -m demo.evaluate``.

It knows nothing of the training run: transformers loads the exported directory, renders the chat template and generates
greedily, and whole replies are compared.
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo import MODEL_DIR
from demo.recall import held_out_prompts
from demo.skills import SKILLS

LENGTHS: Final = (64, 128, 256, 512, 768, 1024, 1500)
_MAX_REPLY_TOKENS: Final = 160


class Exported:
    """The exported directory, loaded by transformers. One thread."""

    def __init__(self, directory: Path) -> None:
        self.codec: Any = AutoTokenizer.from_pretrained(str(directory))
        self.model: Any = AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.float32)

    def reply(self, message: str) -> tuple[str, int]:
        """Answers one user message greedily; returns the reply and the number of prompt tokens."""
        chat = [{"role": "user", "content": message}]
        ids = self.codec.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = self.model.generate(**ids, max_new_tokens=_MAX_REPLY_TOKENS, do_sample=False)
        num_prompt_tokens = ids["input_ids"].shape[1]
        return self.codec.decode(out[0, num_prompt_tokens:], skip_special_tokens=True), num_prompt_tokens

    def completion(self, text: str, num_tokens: int) -> str:
        """Continues plain text greedily."""
        ids = self.codec("<|bos|>" + text, return_tensors="pt", add_special_tokens=False)
        out = self.model.generate(**ids, max_new_tokens=num_tokens, do_sample=False)
        return str(self.codec.decode(out[0, ids["input_ids"].shape[1] :]))


def recall_table(exported: Exported, directory: Path, *, num_prompts: int, lengths: Sequence[int]) -> list[str]:
    """Measures held-out recall per prompt length, as chat and as plain text; returns the rows of a Markdown table."""
    rows = ["| prompt tokens (mean) | prompts | exact, chat | exact, completion |", "|---|---|---|---|"]
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    for length in lengths:
        samples = held_out_prompts(tokenizer, num_tokens=length, num_prompts=num_prompts, seed=7)
        in_chat = in_text = total = 0
        for sample in samples:
            reply, num_tokens = exported.reply(sample.prompt)
            in_chat += reply == sample.answer
            total += num_tokens
            facts, _, name = sample.prompt.removesuffix("?").rpartition(" What is the code of the ")
            in_text += exported.completion(f"{facts} The code of the {name} is", 5) == f" {sample.answer}"
        count = len(samples)
        rows.append(f"| {length} ({total / count:.0f}) | {count} | {in_chat / count:.1%} | {in_text / count:.1%} |")
    return rows


def skill_table(exported: Exported, *, num_prompts: int) -> list[str]:
    """Measures the lesser skills on freshly drawn exchanges; returns the rows of a Markdown table."""
    rows = ["| skill | prompts | exact |", "|---|---|---|"]
    for name, draw in SKILLS.items():
        rng = random.Random(f"evaluate:{name}")
        exchanges = [draw(rng) for _ in range(num_prompts)]
        right = sum(exported.reply(question)[0] == reply for question, reply in exchanges)
        rows.append(f"| {name} | {num_prompts} | {right / num_prompts:.1%} |")
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Measure the exported model.")
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--prompts", type=int, default=200, help="prompts per row")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    exported = Exported(options.model)
    print("\n".join(skill_table(exported, num_prompts=options.prompts)), flush=True)
    print("\n".join(recall_table(exported, options.model, num_prompts=options.prompts, lengths=LENGTHS)), flush=True)


if __name__ == "__main__":
    main()
