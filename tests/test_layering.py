"""The table of ARCHITECTURE.md, enforced: which package may import which, and what must never be reached from where.

Third-party bans are transitive: a gateway that imports a module which imports torch has imported torch.
"""

from functools import cache
from pathlib import Path

import pytest

from tests.import_graph import ImportGraph, When, is_within, read_graph

REPOSITORY = Path(__file__).resolve().parent.parent
SERVICES = ("prefill_svc", "decode_svc")
ROOTS = {
    "staffetta": REPOSITORY / "proto" / "staffetta",
    **{
        package: REPOSITORY / package
        for package in ("kernels", "kvtransfer", "engine", "worker", *SERVICES, "gateway", "cli", "demo", "bench")
    },
}

# What a package may import from the project, itself aside.
ALLOWED: dict[str, tuple[str, ...]] = {
    "staffetta": (),
    "kernels": (),
    "demo": (),
    "kvtransfer": ("staffetta",),
    "engine": ("kernels", "staffetta", "kvtransfer.layout"),
    "worker": ("staffetta", "engine", "kvtransfer", "demo"),
    "prefill_svc": ("worker", "staffetta", "engine", "kvtransfer", "demo"),
    "decode_svc": ("worker", "staffetta", "engine", "kvtransfer", "demo"),
    "gateway": ("staffetta", "demo"),
    "cli": ("staffetta", "kernels", "kvtransfer", "engine", "worker", *SERVICES, "gateway", "demo"),
    "bench": ("staffetta", "kernels", "kvtransfer", "engine", "worker", *SERVICES, "gateway", "cli", "demo"),
}

WIRE = ("grpc", "grpc_health", "grpc_reflection", "grpc_status", "google")
DOORS = ("starlette", "uvicorn")
NUMERICS = ("torch", "triton", "safetensors", "numpy", "xxhash")

# What must not be reached from a package or module, by whatever way, at whatever time.
NEVER: dict[str, tuple[str, ...]] = {
    "staffetta": (*NUMERICS, *DOORS, "tokenizers"),
    "staffetta.config": WIRE,
    "staffetta.errors": WIRE,
    "staffetta.failpoint": WIRE,
    "staffetta.hashing": WIRE,
    "kernels": (*WIRE, *DOORS),
    "kvtransfer": ("torch", *WIRE, *DOORS),
    "kvtransfer.layout": NUMERICS,
    "engine": (*WIRE, *DOORS, "tokenizers"),
    "engine.admission": ("torch",),
    "engine.awaiting": ("torch",),
    "engine.cache": ("torch",),
    "engine.engine": ("torch",),
    "engine.planning": ("torch",),
    "engine.request": ("torch",),
    "engine.scheduler": ("torch",),
    "engine.sequence": ("torch",),
    "engine.step": ("torch",),
    "prefill_svc": (*DOORS, "tokenizers"),
    "decode_svc": (*DOORS, "tokenizers"),
    "gateway": NUMERICS,
}

# What must not be imported before it is needed: `staffetta --help` answers at once.
NOT_AT_START: dict[str, tuple[str, ...]] = {"cli.main": (*WIRE, *DOORS, *NUMERICS, "tokenizers", "asyncio", "uvloop")}

NOWHERE = ("transformers", "tests", "pytest", "hypothesis")
SCRIPT = "demo.evaluate"  # compares the embedded model with a second implementation; nothing imports it


@cache
def project(when: When) -> ImportGraph:
    return read_graph(ROOTS, when=when)


def direct_violations(graph: ImportGraph, package: str, allowed: tuple[str, ...]) -> list[str]:
    """Imports of project modules that the table does not allow: "module imports name"."""
    found = []
    for module in graph.members(package):
        for name in sorted(graph.imports[module]):
            is_project = name.partition(".")[0] in ROOTS
            # Importing a.b runs a/__init__.py too, so a permitted module permits its packages.
            is_allowed = any(is_within(name, other) or is_within(other, name) for other in (package, *allowed))
            if is_project and not is_allowed:
                found.append(f"{module} imports {name}")
    return found


def reached(graph: ImportGraph, package: str, banned: tuple[str, ...]) -> list[str]:
    """Ways from a package to what it must not reach: "module → … → banned"."""
    members = graph.members(package)
    assert members, f"the table names {package}, which does not exist"
    ways = graph.reach(members)
    return [" → ".join(ways[name]) for name in banned if name in ways]


def test_the_table_names_every_package_and_no_other() -> None:
    assert set(ALLOWED) == set(ROOTS)
    folders = {path.parent.name for path in REPOSITORY.glob("*/__init__.py")} - {"tests"}
    assert folders == set(ROOTS) - {"staffetta"}


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_a_package_imports_only_what_the_table_allows(package: str) -> None:
    assert direct_violations(project("ever"), package, ALLOWED[package]) == []


@pytest.mark.parametrize("package", sorted(NEVER))
def test_a_package_never_reaches_what_it_must_not(package: str) -> None:
    assert reached(project("ever"), package, NEVER[package]) == []


@pytest.mark.parametrize("module", sorted(NOT_AT_START))
def test_nothing_heavy_is_imported_before_it_is_needed(module: str) -> None:
    graph = project("at import")
    ways = graph.reach([module])
    assert [" → ".join(ways[name]) for name in NOT_AT_START[module] if name in ways] == []


def test_no_library_code_reaches_what_only_tests_and_one_script_may() -> None:
    graph = project("ever")
    ways = graph.reach(module for module in graph.imports if module != SCRIPT)
    assert [" → ".join(ways[name]) for name in (*NOWHERE, SCRIPT) if name in ways] == []


# The guard, guarded: each kind of violation is seen in a small made-up tree.


def make_tree(folder: Path, files: dict[str, str]) -> dict[str, Path]:
    """Writes files and returns the roots {package: folder}."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        for parent in path.parents:
            if parent == folder:
                break
            (parent / "__init__.py").touch()
    return {name: folder / name for name in {Path(name).parts[0] for name in files}}


def test_a_forbidden_import_is_found_also_inside_a_function(tmp_path: Path) -> None:
    files = {
        "engine/a.py": "import kernels.b\n",
        "engine/deep/c.py": "def work():\n    from gateway import router\n",
        "kernels/b.py": "",
        "gateway/router.py": "",
    }
    graph = read_graph(make_tree(tmp_path, files), when="ever")
    assert direct_violations(graph, "engine", ("kernels",)) == [
        "engine.deep.c imports gateway",
        "engine.deep.c imports gateway.router",
    ]
    assert direct_violations(graph, "engine", ("kernels", "gateway")) == []


def test_permission_for_one_module_is_none_for_its_neighbours(tmp_path: Path) -> None:
    files = {
        "engine/a.py": "from kvtransfer.layout import KVLayout\n",
        "engine/b.py": "from kvtransfer import tcp\n",
        "kvtransfer/layout.py": "",
        "kvtransfer/tcp.py": "",
    }
    graph = read_graph(make_tree(tmp_path, files), when="ever")
    assert direct_violations(graph, "engine", ("kvtransfer.layout",)) == ["engine.b imports kvtransfer.tcp"]


def test_a_banned_library_is_found_at_the_end_of_a_chain_with_the_way_there(tmp_path: Path) -> None:
    files = {
        "gateway/http.py": "from staffetta import validate\n",
        "staffetta/validate.py": "def check():\n    import staffetta.sampling\n",
        "staffetta/sampling.py": "from torch.nn import functional\n",
    }
    graph = read_graph(make_tree(tmp_path, files), when="ever")
    assert reached(graph, "gateway", ("torch",)) == ["gateway.http → staffetta.validate → staffetta.sampling → torch"]


def test_a_banned_library_is_found_in_a_packages_init(tmp_path: Path) -> None:
    roots = make_tree(tmp_path, {"gateway/http.py": "import staffetta.errors\n", "staffetta/errors.py": ""})
    (tmp_path / "staffetta" / "__init__.py").write_text("import numpy as np\n")
    assert reached(read_graph(roots, when="ever"), "gateway", ("numpy",)) == ["gateway.http → staffetta → numpy"]


def test_imports_in_functions_are_not_imports_at_start_and_type_checking_is_never(tmp_path: Path) -> None:
    text = "if TYPE_CHECKING:\n    import torch\nclass A:\n    import grpc\n    def f(self):\n        import uvicorn\n"
    roots = make_tree(tmp_path, {"cli/main.py": text})
    assert read_graph(roots, when="at import").imports["cli.main"] == {"grpc"}
    assert read_graph(roots, when="ever").imports["cli.main"] == {"grpc", "uvicorn"}


def test_a_rule_for_a_module_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    graph = read_graph(make_tree(tmp_path, {"cli/main.py": ""}), when="ever")
    with pytest.raises(AssertionError, match=r"the table names engine\.scheduler, which does not exist"):
        reached(graph, "engine.scheduler", ("torch",))
