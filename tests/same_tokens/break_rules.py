"""Breaks each rule of the numerics contract and shows that the tests notice: `python -m tests.same_tokens.break_rules`.

The kernels are built once as they are and once per broken rule, into a temporary directory; the tests of the contract
must pass on the first build and fail on every other. What is Python's is broken by a plugin:
where random numbers come from, and that a choice copies a block before it writes where others read.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from kernels.cpu.build import build

KERNELS = "tests/same_tokens/test_kernel_contract.py"
ENGINE = "tests/same_tokens/test_engine_in_one_process.py"


class Rule(NamedTuple):
    """A way to break a rule: the build's switch, or the plugin, and the tests that are about it."""

    what: str
    switch: str | None
    tests: tuple[str, ...]


RULES = (
    Rule("nothing", "", (KERNELS, ENGINE, "-k", "not scalar and not avx2")),
    Rule("linear: K split by the number of rows", "LINEAR", (KERNELS, "-k", "linear")),
    Rule("attention: a number of splits, not a size", "ATTENTION", (KERNELS, "-k", "attend")),
    Rule("int8: one activation scale for the batch", "SCALES", (KERNELS, "-k", "linear and int8")),
    Rule("reductions: a tree per number of threads", "TREES", (KERNELS, "-k", "tree")),
    Rule("sampling: random numbers from a stream", None, ("-p", "tests.same_tokens.random_stream", ENGINE)),
    Rule("choices: written in place, not copied", None, ("-p", "tests.same_tokens.fork_in_place", ENGINE)),
)


def _run(rule: Rule, library: Path | None) -> tuple[int, str]:
    """Pytest's exit status for the rule's tests, and the first failure."""
    kernels = [] if library is None else ["--kernels", str(library)]
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=1", "--tb=line", *rule.tests, *kernels]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    failures = [line for line in result.stdout.splitlines() if line.startswith("FAILED")]
    return result.returncode, failures[0].removeprefix("FAILED ") if failures else result.stdout.splitlines()[-1]


def main() -> int:
    """Prints one line per rule. Returns 1 when a broken rule went unnoticed, or the unbroken build failed."""
    num_wrong = 0
    with tempfile.TemporaryDirectory() as directory:
        for rule in RULES:
            library = None
            if rule.switch is not None:
                place = Path(directory) / (rule.switch or "kept")
                library = build(place, definitions=(f"STAFFETTA_BREAK={rule.switch}",))
            status, first = _run(rule, library)
            expected = 0 if rule.switch == "" else 1
            num_wrong += status != expected
            verdict = {0: "passes", 1: "fails"}.get(status, f"pytest ended with {status}")
            print(f"{rule.what:44} {verdict:8} {'as it must' if status == expected else 'WRONG'}  {first}", flush=True)
    return 1 if num_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
