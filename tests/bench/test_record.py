"""Figures from times: exact values of small cases."""

from dataclasses import asdict

import pytest

from bench.record import Figures, Record, Slo, figures, medians, percentile, ratios
from bench.table import format_cell, format_table

LOOSE = Slo(ttft_s=10.0, tpot_s=10.0)


def test_a_records_latencies() -> None:
    record = Record(due_s=1.0, arrivals=(1.5, 1.75, 2.5), output_tokens=5)
    assert record.ttft_s == 0.5
    assert record.itl_s == (0.25, 0.75)
    assert record.tpot_s == 0.25  # one second for the four tokens after the first, however they arrived


def test_one_token_has_no_time_per_token() -> None:
    assert Record(0.0, (0.5,), 1).tpot_s == 0.0
    assert figures([Record(0.0, (0.5,), 1)], slo=LOOSE, client_cpu_s=0.0).itl_p99_ms == 0.0


def test_figures_of_two_records() -> None:
    records = [Record(0.0, (0.5, 1.0, 1.5), 3), Record(1.0, (3.0, 4.0), 2)]
    found = figures(records, slo=Slo(ttft_s=1.0, tpot_s=0.5), client_cpu_s=0.001)
    expected = Figures(
        ttft_p50_ms=1250.0,
        ttft_p99_ms=1985.0,
        tpot_p50_ms=750.0,
        tpot_p99_ms=995.0,
        itl_p50_ms=500.0,
        itl_p99_ms=990.0,
        output_tokens_per_s=1.25,
        requests_per_s=0.5,
        goodput_per_s=0.25,
        client_us_per_token=200.0,
    )
    assert asdict(found) == pytest.approx(asdict(expected))


@pytest.mark.parametrize("slo", [Slo(0.4, 1.0), Slo(1.0, 0.4)])
def test_goodput_needs_both_bounds_met(slo: Slo) -> None:
    assert figures([Record(0.0, (0.5, 1.0), 2)], slo=slo, client_cpu_s=0.0).goodput_per_s == 0.0


@pytest.mark.parametrize(("percent", "expected"), [(0, 1.0), (50, 2.5), (99, 3.97), (100, 4.0)])
def test_percentiles_lie_between_neighbours(percent: float, expected: float) -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], percent) == pytest.approx(expected)


def test_medians_are_taken_figure_by_figure() -> None:
    rounds = [figures([Record(0.0, (ttft, ttft + 1.0), 2)], slo=LOOSE, client_cpu_s=0.0) for ttft in (0.1, 0.5, 0.2)]
    assert medians(rounds).ttft_p50_ms == 200.0
    assert medians(rounds).tpot_p50_ms == pytest.approx(1000.0)


def test_ratios_are_taken_round_by_round() -> None:
    assert ratios([2.0, 8.0], [1.0, 4.0]) == [2.0, 2.0]
    assert ratios([2.0], [0.0]) == [0.0]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.1234, "0.123"),
        (0.99999, "1.00"),
        (9.99999, "10.0"),
        (1.234, "1.23"),
        (12.34, "12.3"),
        (123.4, "123"),
        (12345.6, "12,346"),
        (None, "–"),
        ("a", "a"),
    ],
)
def test_cells_have_three_digits_that_matter(value: object, text: str) -> None:
    assert format_cell(value) == text


def test_numbers_stand_to_the_right() -> None:
    table = format_table(("name", "rate"), [("a", 1.0), ("bcd", None)])
    assert table.splitlines() == ["  name  rate", "  ----  ----", "  a     1.00", "  bcd      –"]
