"""Bars: exact ratios round by round, on which side of their bounds, what is left out, and the table."""

from dataclasses import replace

import pytest

from bench.bars import DEMANDS, Bar, Sense, bar_fields, bars_table, limit_bars, own_bars, peer_bars
from bench.limits import Limits
from bench.measure import Measurement, PhaseResult
from bench.model_costs import Arithmetic, ModelCosts
from bench.record import FIGURE_NAMES, Figures
from bench.shapes import SHAPES

LIMITS = Limits(
    threads=2,
    read_one_thread=10.0,
    read=20.0,
    copy=5.0,
    gemm_float32=200.0,
    gemm_bfloat16=400.0,
    gemm_int8=1000.0,
)
ZERO = Figures(**dict.fromkeys(FIGURE_NAMES, 0.0))


def make_measurement(*phases: tuple[str, str, list[dict[str, float]]]) -> Measurement:
    results = [PhaseResult(phase, server, tuple(replace(ZERO, **each) for each in of)) for phase, server, of in phases]
    return Measurement(tuple(results), rate=0.0, seed=1, frozen=())


def make_bar(*ratios: float, sense: Sense = Sense.AT_MOST, bound: float = 1.0) -> Bar:
    return Bar("bar", "ours", ratios, "limit", (1.0,) * len(ratios), sense, bound)


@pytest.mark.parametrize(
    ("arithmetic", "weight_bytes", "gemm"), [(Arithmetic.BF16, 946_339_840, 200.0), (Arithmetic.INT8, 505_937_920, 1e3)]
)
def test_one_stream_stands_beside_the_limits_of_its_own_rounds(
    arithmetic: Arithmetic, weight_bytes: int, gemm: float
) -> None:
    costs = ModelCosts.from_shape(SHAPES["0.5b"], arithmetic)
    rounds = [{"tpot_p50_ms": 40.0, "ttft_p50_ms": 1000.0}, {"tpot_p50_ms": 50.0, "ttft_p50_ms": 2000.0}]
    samples = [LIMITS, replace(LIMITS, read=40.0, gemm_float32=100.0, gemm_int8=500.0)]
    decode, prefill = limit_bars(make_measurement(("W1", "a", rounds)), server="a", costs=costs, limits=samples)
    assert decode.ours == (40.0, 50.0)
    assert decode.beside == pytest.approx((weight_bytes / 20e9 * 1e3, weight_bytes / 40e9 * 1e3))
    flops = SHAPES["0.5b"].prefill_flops(512)
    assert prefill.ours == pytest.approx((flops / 1e9, flops / 2e9))
    assert prefill.beside == (gemm, gemm / 2)
    assert (decode.sense, prefill.sense) == (Sense.AT_MOST, Sense.AT_LEAST)
    assert (decode.bound, prefill.bound) == {
        Arithmetic.BF16: (1.15, 0.75),
        Arithmetic.INT8: (1.3, 0.65),
    }[arithmetic]


def test_a_peer_stands_beside_us_in_every_workload_that_both_ran() -> None:
    figures = {"output_tokens_per_s": 280.0, "ttft_p50_ms": 100.0, "ttft_p99_ms": 300.0, "itl_p99_ms": 40.0}
    theirs = {"output_tokens_per_s": 200.0, "ttft_p50_ms": 150.0, "ttft_p99_ms": 400.0, "itl_p99_ms": 80.0}
    measured = [
        (phase, server, [of])
        for phase in ("W2", "W3 cold", "W4")
        for server, of in (("ours", figures), ("other", theirs), ("third", figures))
    ]
    bars = peer_bars(make_measurement(*measured), server="ours", peer="other", arithmetic=Arithmetic.INT8)
    assert [(bar.name, bar.beside_name, bar.ratios[0], bar.sense, bar.is_met) for bar in bars] == [
        ("W2 tokens/s", "other", 1.4, Sense.AT_LEAST, True),
        ("W3 cold TTFT ms", "other", pytest.approx(100 / 150), Sense.AT_MOST, True),
        ("W4 p99 TTFT ms", "other", 0.75, Sense.AT_MOST, True),
        ("W4 p99 ITL ms", "other", 0.5, Sense.AT_MOST, True),
    ]
    bars = peer_bars(make_measurement(*measured[3:6]), server="ours", peer="other", arithmetic=Arithmetic.BF16)
    assert [(bar.name, bar.is_met) for bar in bars] == [("W3 cold TTFT ms", False)]


def test_a_warm_prefix_stands_beside_the_cold_one_where_that_is_demanded() -> None:
    measurement = make_measurement(
        ("W3 cold", "a", [{"ttft_p50_ms": 800.0}] * 2),
        ("W3 warm", "a", [{"ttft_p50_ms": 100.0}, {"ttft_p50_ms": 120.0}]),
    )
    (bar,) = own_bars(measurement, server="a", arithmetic=Arithmetic.BF16)
    assert (bar.ratios, bar.bound, bar.is_met) == ((0.125, 0.15), 0.125, False)
    assert own_bars(measurement, server="a", arithmetic=Arithmetic.INT8) == []
    assert own_bars(measurement, server="b", arithmetic=Arithmetic.BF16) == []


def test_without_measured_limits_there_is_no_bar_of_them() -> None:
    measurement = make_measurement(("W1", "a", [{"tpot_p50_ms": 40.0, "ttft_p50_ms": 1000.0}]))
    costs = ModelCosts.from_shape(SHAPES["0.5b"], Arithmetic.BF16)
    assert limit_bars(measurement, server="a", costs=costs, limits=[]) == []
    assert limit_bars(measurement, server="b", costs=costs, limits=[LIMITS]) == []


@pytest.mark.parametrize(
    ("ratios", "sense", "is_met"),
    [
        ((0.9, 1.0, 9.0), Sense.AT_MOST, True),
        ((0.9, 1.1, 9.0), Sense.AT_MOST, False),
        ((0.1, 1.0, 1.1), Sense.AT_LEAST, True),
        ((0.1, 0.9, 1.1), Sense.AT_LEAST, False),
    ],
)
def test_the_median_round_meets_a_bar(ratios: tuple[float, ...], sense: Sense, is_met: bool) -> None:
    assert make_bar(*ratios, sense=sense).is_met is is_met


def test_the_table_tells_medians_spreads_and_verdicts() -> None:
    header, _, first, second = bars_table([make_bar(2.0, 1.5, 1.8, bound=1.9), make_bar(2.0)]).splitlines()
    assert header.split() == ["bar", "server", "ours", "limit", "or", "peer", "its", "ratio", "demanded", "met"]
    assert first.split() == [
        *("bar", "ours", "1.80", "(1.50–2.00)", "limit", "1.00", "(1.00–1.00)", "1.80", "(1.50–2.00)"),
        *("≤", "1.90", "yes"),
    ]
    assert second.split() == ["bar", "ours", "2.00", "limit", "1.00", "2.00", "≤", "1.00", "no"]


def test_a_bar_is_written_with_its_rounds_and_its_verdict() -> None:
    fields = bar_fields(make_bar(2.0, 4.0, sense=Sense.AT_LEAST, bound=1 / 8))
    assert fields == {
        "name": "bar",
        "server": "ours",
        "ours": (2.0, 4.0),
        "beside_name": "limit",
        "beside": (1.0, 1.0),
        "ratio": 3.0,
        "demanded": "≥ 0.125",
        "is_met": True,
    }


def test_every_arithmetic_has_demands() -> None:
    assert set(DEMANDS) == set(Arithmetic)
