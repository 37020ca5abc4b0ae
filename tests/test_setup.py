"""What `make setup` and the images install: torch from the index that was asked for, and pins of what is declared."""

import importlib.metadata
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("variables", "options"), [((), ""), (("TORCH_INDEX_URL=https://i/cpu",), " --index-url 'https://i/cpu'")]
)
def test_the_index_of_cpu_builds_is_asked_for_torch_alone(variables: tuple[str, ...], options: str) -> None:
    done = subprocess.run(
        ["make", "-n", "-B", "setup", *variables], cwd=ROOT, capture_output=True, text=True, check=True
    )
    installs = [" ".join(line.split()) for line in done.stdout.splitlines() if "pip install" in line]
    assert [line.partition("constraints.txt")[2] for line in installs] == [f"{options} torch==2.13.0", " -e '.[dev]'"]


def test_every_pin_is_of_something_that_is_needed() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(line.partition("==")[0]) for line in lines}
    assert pinned - needed(Requirement("staffetta[dev]")) == set()


def needed(*roots: Requirement) -> set[str]:
    """The names of all distributions that `roots` bring, as installed here."""
    todo = list(roots)
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        requirement = todo.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        for line in importlib.metadata.distribution(name).requires or ():
            needed_by_it = Requirement(line)
            marker = needed_by_it.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras | {""}):
                todo.append(needed_by_it)
    return {name for name, _ in seen}
