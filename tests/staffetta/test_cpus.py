"""Sets of CPUs as text, and how many threads they run."""

import pytest

from staffetta.cpus import format_cpus, parse_cpus, usable_threads


def test_parts_name_single_cpus_and_ranges() -> None:
    assert parse_cpus(["0-3", "8", "2-4"]) == {0, 1, 2, 3, 4, 8}
    assert parse_cpus([]) == frozenset()


def test_the_fewest_parts_are_written() -> None:
    assert format_cpus([8, 1, 0, 2, 5, 6, 8]) == ("0-2", "5-6", "8")
    assert format_cpus([]) == ()


@pytest.mark.parametrize("part", ["", "a", "-1", "3-", "3-2", "1,2", "1-2-3", "٣", "123456"])
def test_what_is_no_part_is_refused(part: str) -> None:
    with pytest.raises(ValueError, match="is not a CPU's number or a range of them, such as 0-3"):
        parse_cpus([part])


@pytest.mark.parametrize(
    ("num_cpus", "quota", "threads"),
    [(8, None, 8), (8, 2.0, 2), (8, 1.5, 2), (8, 0.1, 1), (2, 3.5, 2), (1, 0.0, 1), (3, 2.0000001, 3)],
)
def test_a_quota_bounds_threads_and_leaves_one(num_cpus: int, quota: float | None, threads: int) -> None:
    assert usable_threads(num_cpus, quota) == threads
