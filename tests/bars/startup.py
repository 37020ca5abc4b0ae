"""Bar: the first five minutes are not spent waiting.

After set-up: `staffetta serve demo --once` gives its first token within 8 s of its start, `staffetta --help` answers
within 0.3 s, a gateway within 1.5 s, and no gateway process maps torch or imports transformers.
"""

import contextlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import httpx
import psutil

from tests.bars.report import parse_size, print_table, spread, verdict
from tests.e2e.waiting import wait_until

MOST_FIRST_TOKEN_S: Final = 8.0
MOST_HELP_S: Final = 0.3
MOST_GATEWAY_S: Final = 1.5
FORBIDDEN: Final = ("torch", "transformers")

_STAFFETTA: Final = str(Path(sys.executable).with_name("staffetta"))
_PROMPT: Final = "The code of the otter is 7341. What is the code of the otter?"


def first_token_s() -> float:
    """From the start of `serve --once` to the first byte of its answer."""
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        started = time.monotonic()
        process = stack.enter_context(
            subprocess.Popen(
                [_STAFFETTA, "serve", "demo", "--once", _PROMPT, "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**_environment(), "TMPDIR": directory},
            )
        )
        assert process.stdout is not None and process.stderr is not None
        first = process.stdout.read(1)
        elapsed = time.monotonic() - started
        process.stdout.read()
        said = process.stderr.read().decode()
        assert process.wait(30) == 0 and first, f"serve --once failed:\n{said}"
        assert "relay  prefill-0 → decode-0 · " in said and "nothing to move" not in said, f"no hand-off:\n{said}"
    return elapsed


def help_s() -> float:
    """What `staffetta --help` takes, from fork to exit."""
    started = time.monotonic()
    subprocess.run([_STAFFETTA, "--help"], check=True, capture_output=True)
    return time.monotonic() - started


def gateway_s() -> tuple[float, list[str]]:
    """From the start of a gateway to its first answer on /health; and what it maps that it must not."""
    http = _free_address()
    started = time.monotonic()
    with subprocess.Popen(
        [_STAFFETTA, "gateway", "--http", http, "--grpc", "127.0.0.1:0", "--log-level", "warning"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**_environment(), "STAFFETTA_CLUSTER_KEY": "00" * 32},
    ) as process:
        try:
            wait_until(lambda: _is_healthy(http), bool, timeout_s=20)
            elapsed = time.monotonic() - started
            maps = {Path(found.path).name for found in psutil.Process(process.pid).memory_maps()}
        finally:
            process.terminate()
    return elapsed, sorted(name for name in maps if any(word in name for word in FORBIDDEN))


def forbidden_imports() -> list[str]:
    """What importing the gateway imports although it must not."""
    code = f"import gateway.main, sys; print(*(name for name in {FORBIDDEN!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.split()


def main(argv: Sequence[str]) -> int:
    """Runs the bar."""
    size = parse_size(__doc__, argv, short=3, full=5)
    firsts = [first_token_s() for _ in range(size.count)]
    helps = [help_s() for _ in range(2 * size.count)]
    gateways = [gateway_s() for _ in range(size.count)]
    found = [*forbidden_imports(), *(name for _, names in gateways for name in names)]
    measured = (
        ("serve --once: start to first token", firsts, MOST_FIRST_TOKEN_S),
        ("--help", helps, MOST_HELP_S),
        ("gateway: start to /health", [seconds for seconds, _ in gateways], MOST_GATEWAY_S),
    )
    print_table(
        "start-up, seconds: median (smallest to largest)",
        ("what", "runs", "took", "at most"),
        [[what, len(values), spread(values), most] for what, values, most in measured],
    )
    failures = [
        f"{what}: {statistics.median(values):.2f} s, at most {most:g} s demanded"
        for what, values, most in measured
        if statistics.median(values) > most
    ]
    return verdict([*failures, *(f"a gateway loads {name}" for name in sorted(set(found)))])


def _is_healthy(address: str) -> bool:
    try:
        return httpx.get(f"http://{address}/health", timeout=1.0).status_code == 200
    except httpx.TransportError:
        return False


def _free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"127.0.0.1:{probe.getsockname()[1]}"


def _environment() -> dict[str, str]:
    return dict(psutil.Process().environ())


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
