"""`python -m tests.bars.help_time`: how long `staffetta --help` takes. The bar is 0.3 s, for the median of 15 runs."""

import statistics
import subprocess
import sys
import time

BAR_S = 0.3
NUM_RUNS = 15


def main() -> int:
    """Prints median and range of wall times; 1 when the median misses the bar."""
    times = sorted(_run_once() for _ in range(NUM_RUNS))
    median = statistics.median(times)
    print(f"staffetta --help: median {median * 1000:.0f} ms, {times[0] * 1000:.0f} to {times[-1] * 1000:.0f} ms")
    return 0 if median <= BAR_S else 1


def _run_once() -> float:
    started = time.perf_counter()
    command = "import sys; from cli.main import main; sys.argv[1:] = ['--help']; sys.exit(main())"
    subprocess.run([sys.executable, "-c", command], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


if __name__ == "__main__":
    raise SystemExit(main())
