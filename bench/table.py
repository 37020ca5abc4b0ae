"""Tables for people: columns as wide as they need to be, numbers to the right."""

from collections.abc import Sequence


def format_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """The table as text, two blanks before every line. Floats get three significant digits, None a dash."""
    cells = [list(headers), *([format_cell(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headers))]
    to_right = [all(_is_number(row[column]) for row in rows) for column in range(len(headers))]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, to_right, strict=True)
        ).rstrip()
        for row in (cells[0], ["-" * width for width in widths], *cells[1:])
    ]
    return "\n".join(f"  {line}" for line in lines)


def format_cell(value: object) -> str:
    """One value: 0.123, 1.23, 12.3, 123, 12,345; None is a dash."""
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    size = abs(float(f"{value:.3g}"))  # 9.999 is shown as 10.0, so it has the digits of 10
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:,.{digits}f}"


def _is_number(value: object) -> bool:
    return value is None or isinstance(value, int | float)
