"""Writes a result to keep: what was measured, and on what machine, as JSON that a diff can be read of."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from bench.machine import describe_machine


def write_result(path: Path, content: Mapping[str, object]) -> None:
    """Writes `content`, JSON values under names, after the machine's description. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    described = {"machine": dataclasses.asdict(describe_machine()), **content}
    path.write_text(json.dumps(described, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
