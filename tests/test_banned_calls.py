"""What no library code may do: read formats that run code, evaluate text, load models by remote code.

The wire is protobuf and raw bytes of declared length, weights are safetensors, YAML is read by `safe_load`.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_layering import ROOTS

BANNED_MODULES = ("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")
BANNED_CALLS = (
    "torch.load",
    "torch.save",
    "torch.serialization.load",
    "torch.serialization.save",
    "numpy.load",
    "yaml.load",
    "yaml.load_all",
    "yaml.full_load",
    "yaml.unsafe_load",
    "eval",
    "exec",
    "builtins.eval",
    "builtins.exec",
)
BANNED_KEYWORDS = ("trust_remote_code", "allow_pickle")


def banned_uses(source: str) -> list[str]:
    """Everything in `source` that is banned: "line: what". Aliases are followed, mentions without a call count."""
    tree = ast.parse(source)
    aliases = _aliases(tree)
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names if _is_banned_module(alias.name)]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            found += [(node.lineno, name) for name in names[:1] if _is_banned_module(name)]
            found += [(node.lineno, name) for name in names[1:] if name in BANNED_CALLS]
        elif isinstance(node, (ast.Name, ast.Attribute)):
            name = _full_name(node, aliases)
            found += [(node.lineno, name)] if name in BANNED_CALLS else []
        elif isinstance(node, ast.keyword) and node.arg in BANNED_KEYWORDS:
            found.append((node.value.lineno, node.arg))
    return [f"{line}: {what}" for line, what in sorted(found)]


def _is_banned_module(name: str) -> bool:
    return name.partition(".")[0] in BANNED_MODULES


def _aliases(tree: ast.Module) -> dict[str, str]:
    """What names stand for: {"t": "torch"} after `import torch as t`."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                aliases[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return aliases


def _full_name(node: ast.expr, aliases: dict[str, str]) -> str:
    """The dotted name that an expression spells, its first part resolved; "" for anything else."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id)
    if isinstance(node, ast.Attribute) and (owner := _full_name(node.value, aliases)):
        return f"{owner}.{node.attr}"
    return ""


def library_files() -> Iterator[Path]:
    for folder in ROOTS.values():
        yield from sorted(folder.rglob("*.py"))


def test_no_library_code_uses_what_is_banned() -> None:
    found = {str(path): uses for path in library_files() if (uses := banned_uses(path.read_text()))}
    assert found == {}


def test_the_guard_reads_library_code() -> None:
    assert len(list(library_files())) > 100


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import pickle", ["1: pickle"]),
        ("import dill as d", ["1: dill"]),
        ("from marshal import loads", ["1: marshal"]),
        ("def f():\n    import shelve", ["2: shelve"]),
        ("import torch\ntorch.load('x')", ["2: torch.load"]),
        ("import torch as t\nt.save(a, 'x')", ["2: torch.save"]),
        ("from torch import load", ["1: torch.load"]),
        ("from torch import load as read\nread('x')", ["1: torch.load", "2: torch.load"]),
        ("import torch.serialization\ntorch.serialization.load('x')", ["2: torch.serialization.load"]),
        ("import yaml\nyaml.load(text, Loader=yaml.SafeLoader)", ["2: yaml.load"]),
        ("import yaml as y\ny.unsafe_load(text)", ["2: yaml.unsafe_load"]),
        ("eval('1')", ["1: eval"]),
        ("run = exec", ["1: exec"]),
        ("import builtins\nbuiltins.eval('1')", ["2: builtins.eval"]),
        ("Model.from_pretrained(name, trust_remote_code=True)", ["1: trust_remote_code"]),
        ("import numpy as np\nnp.load(path, allow_pickle=True)", ["2: allow_pickle", "2: numpy.load"]),
    ],
)
def test_each_banned_use_is_found_under_any_name(source: str, expected: list[str]) -> None:
    assert banned_uses(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        "import yaml\nyaml.safe_load(text)",
        "model.eval()",
        "self.load(path)",
        "from safetensors.torch import load_file\nload_file(path)",
        "# pickle, eval, exec\ntext = 'torch.load'",
    ],
)
def test_what_only_looks_alike_is_not_found(source: str) -> None:
    assert banned_uses(source) == []
