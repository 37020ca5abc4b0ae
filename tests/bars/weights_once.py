"""Bar: a host holds a model's packed weights once, and a start with them on disk is fast.

On a random checkpoint of the 0.5B shape in bf16, from the start of `serve --once` to the first byte of its answer: at
most 8 s with an empty cache, at most 4 s with packed weights there. Of prefill and decode together, after an answer
that went through both: the memory that is theirs (PSS) is at most the packed weights once, both KV pools, and 350 MiB
each.
"""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from bench.make_checkpoint import main as make_checkpoint
from tests.bars.report import parse_size, print_table, spread, verdict

MOST_COLD_S: Final = 8.0
MOST_WARM_S: Final = 4.0
MOST_OTHER_BYTES: Final = 350 * 2**20
"""Of a worker besides weights and pool: interpreter, libraries, tables, scratch memory."""

_PROMPT: Final = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
_NO_PORT: Final = ("--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0")


@contextlib.contextmanager
def serving(model: Path, cache: Path, *flags: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A running `serve`, ended with the block; what it said is shown when it ended before."""
    command = (sys.executable, "-m", "cli.main", "serve", str(model), "--dtype", "bfloat16", "--cache-dir", str(cache))
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen([*command, *flags, *_NO_PORT], stdout=subprocess.PIPE, stderr=said)
        try:
            yield process
        finally:
            is_running = process.poll() is None
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGTERM)  # at once
            process.communicate()
            if not is_running:
                said.seek(0)
                print(said.read().decode(), file=sys.stderr)


def first_token_s(model: Path, cache: Path) -> float:
    """From the start of `serve --once` to the first byte of its answer."""
    started = time.monotonic()
    with serving(model, cache, "--once", _PROMPT) as process:
        assert process.stdout is not None
        assert process.stdout.read(1), "serve ended without an answer"
        return time.monotonic() - started


def memory(model: Path, cache: Path) -> tuple[list[int], int]:
    """PSS of each worker and the bytes of all pools, once a self-test has gone through both workers."""
    with serving(model, cache, "--json", "--no-local-prefill") as process:
        assert process.stdout is not None
        ready: dict[str, Any] = json.loads(process.stdout.readline())
        workers = ready["workers"]
        return [_pss(worker["pid"]) for worker in workers], sum(worker["pool_bytes"] for worker in workers)


def _pss(pid: int) -> int:
    """Bytes of a process's memory; what it shares with others counts in shares."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "Pss":
            return int(rest.split()[0]) * 1024
    raise AssertionError("the kernel tells no PSS")


def main(argv: Sequence[str]) -> int:
    """Runs the bar."""
    size = parse_size(__doc__, argv, short=1, full=5)
    cold, warm = [], []
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "model"
        make_checkpoint([str(model), "--shape", "0.5b"])
        for number in range(size.count):
            cache = Path(directory) / f"cache-{number}"
            cold.append(first_token_s(model, cache))
            warm.append(first_token_s(model, cache))
        pss, pool_bytes = memory(model, cache)
        (packed,) = (path.stat().st_size for path in cache.glob("*.weights"))
    most = packed + pool_bytes + len(pss) * MOST_OTHER_BYTES
    print_table(
        f"start of serve to first token, seconds: median (smallest to largest); load average {os.getloadavg()[0]:.1f}",
        ("packed weights", "runs", "took", "at most"),
        [["none yet", len(cold), spread(cold), MOST_COLD_S], ["on disk", len(warm), spread(warm), MOST_WARM_S]],
    )
    print_table(
        "memory of prefill and decode, MiB",
        ("PSS of each", "together", "packed weights", "pools", "at most"),
        [[" + ".join(str(each >> 20) for each in pss), *(each >> 20 for each in (sum(pss), packed, pool_bytes, most))]],
    )
    measured = (("without packed weights", cold, MOST_COLD_S), ("with packed weights", warm, MOST_WARM_S))
    failures = [
        f"start {what}: {statistics.median(values):.1f} s, at most {limit:g} s demanded"
        for what, values, limit in measured
        if statistics.median(values) > limit
    ]
    if sum(pss) > most:
        failures.append(f"prefill and decode take {sum(pss) >> 20} MiB, at most {most >> 20} MiB demanded")
    return verdict(failures)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
