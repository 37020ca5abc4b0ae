"""Who imports whom, read from the source without running it: the ground of `test_layering`.

Every import counts, also those inside functions; `TYPE_CHECKING` blocks, which never run, do not.
"""

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

When = Literal["ever", "at import"]


@dataclass(frozen=True, slots=True)
class ImportGraph:
    """`imports[module]` are the names that a project module imports: modules of the project, and libraries."""

    imports: Mapping[str, frozenset[str]]

    def reach(self, start: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Everything that importing `start` may import in the end, with the way: {name: (start module, …, name)}."""
        ways: dict[str, tuple[str, ...]] = {module: (module,) for module in start}
        pending = list(ways)
        while pending:
            module = pending.pop()
            for name in sorted(self.imports.get(module, ())):
                if name not in ways:
                    ways[name] = (*ways[module], name)
                    pending.append(name)
        return ways

    def members(self, *packages: str) -> list[str]:
        """All project modules of the packages, or the modules themselves."""
        return sorted(module for module in self.imports if any(is_within(module, package) for package in packages))


def is_within(module: str, package: str) -> bool:
    """Whether `module` is `package` or inside it."""
    return module == package or module.startswith(package + ".")


def read_graph(roots: Mapping[str, Path], *, when: When) -> ImportGraph:
    """Reads all packages: {package name: its folder}. `when` says whether imports inside functions count."""
    sources = {module: path for package, folder in roots.items() for module, path in _modules(package, folder)}
    imports: dict[str, frozenset[str]] = {}
    for module, path in sources.items():
        names: set[str] = set()
        for name in _imported_names(ast.parse(path.read_text(), str(path)), when=when):
            names.update(_with_parents(name, sources))
        imports[module] = frozenset(names - {module})
    return ImportGraph(imports)


def _modules(package: str, folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        yield ".".join([package, *(part for part in parts if part != "__init__")]), path


def _imported_names(tree: ast.Module, *, when: When) -> Iterator[str]:
    """Names after `import`, and `a.b` as well as `a` for `from a import b`: `b` may be a module."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports are absolute in this project"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if (is_function and when == "at import") or _is_type_checking(node):
            continue
        pending.extend(ast.iter_child_nodes(node))


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _with_parents(name: str, sources: Mapping[str, Path]) -> Iterator[str]:
    """A project module brings its packages with it; of a name that is no module, only the package it is in remains."""
    top = name.partition(".")[0]
    if not any(is_within(module, top) for module in sources):
        yield top
        return
    parts = name.split(".")
    for length in range(1, len(parts) + 1):
        candidate = ".".join(parts[:length])
        if candidate in sources:
            yield candidate
