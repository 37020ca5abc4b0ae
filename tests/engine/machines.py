"""How long a step takes on machines that pacing is tested on: models, with no clock."""

from collections.abc import Callable

Machine = Callable[[int, int], float]
"""Seconds of a step with so many streams and so many prompt tokens."""


def make_machine(*, weights_s: float, row_s: float) -> Machine:
    """Reads the weights once and computes every row: a step takes whichever lasts longer."""
    return lambda num_generating, num_prompt_tokens: max(weights_s, row_s * (num_generating + num_prompt_tokens))


SMALL = make_machine(weights_s=0.040, row_s=0.0044)
"""Two cores and 0.5 B parameters in bfloat16: 40 ms for the weights, 4.4 ms a row."""
QUICK = make_machine(weights_s=0.010, row_s=0.0001)


def linear(num_generating: int, num_prompt_tokens: int) -> float:
    """10 ms, and a millisecond for every prompt token."""
    return 0.010 + 0.001 * num_prompt_tokens
