"""What every bar takes and prints: its options, a table, medians with their spread, a verdict that is an exit code."""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Size:
    """How much a run measures. `count` is the number of requests, kills or starts, as the bar counts."""

    count: int
    seed: int


def parse_size(doc: str | None, argv: Sequence[str], *, short: int, full: int) -> Size:
    """`--full` is what the bar demands, `--count N` anything else, neither is the short form."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n\n")[0])
    parser.add_argument("--full", action="store_true", help=f"measure {full}")
    parser.add_argument("--count", type=int, default=short, help=f"measure this many; default {short}")
    parser.add_argument("--seed", type=int, default=1, help="draws prompts and moments; default 1")
    arguments = parser.parse_args(argv)
    return Size(full if arguments.full else arguments.count, arguments.seed)


def print_table(title: str, headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Columns as wide as they need to be, numbers to the right."""
    cells = [list(map(str, headers)), *(list(map(_format, row)) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headers))]
    is_number = [all(isinstance(row[column], int | float) for row in rows) for column in range(len(headers))]
    print(f"\n{title}\n")
    for index, row in enumerate(cells):
        padded = (
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, is_number, strict=True)
        )
        print("  " + "  ".join(padded).rstrip())
        if index == 0:
            print("  " + "  ".join("-" * width for width in widths))


def spread(values: Sequence[float], *, digits: int = 3) -> str:
    """The median, and the smallest and largest value; a dash for none."""
    if not values:
        return "-"
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def verdict(failures: Sequence[str]) -> int:
    """Prints whether the bar is met, and returns the exit code: 0 or 1."""
    for failure in failures:
        print(f"\nMISSED: {failure}")
    if not failures:
        print("\nmet")
    return 1 if failures else 0


def _format(cell: object) -> str:
    return f"{cell:.3f}" if isinstance(cell, float) else str(cell)
