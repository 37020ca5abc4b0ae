"""Command lines, result files, floors; and one real server under load through both doors."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from bench import kernel_steps, kernels, limits, serve
from bench.kernel_steps import KernelStep
from bench.limits import Limits, best_limits, measure_limits
from bench.local_server import LocalServer, ServerEndedError
from bench.machine import describe_machine
from bench.measure import Plan
from bench.shapes import SHAPES, ModelShape
from bench.target import Address, parse_target
from kernels.backend import select
from staffetta.exits import UsageError

LIMITS = Limits(
    threads=2,
    read_one_thread=10.0,
    read=20.0,
    copy=5.0,
    gemm_float32=200.0,
    gemm_bfloat16=400.0,
    gemm_int8=1000.0,
)
SMALL = ModelShape(hidden_size=64, intermediate_size=96, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=16)


def planned(*argv: str) -> Plan:
    """What a command line asks for."""
    parser = argparse.ArgumentParser()
    serve.add_plan_arguments(parser)
    return serve.make_plan(parser.parse_args(argv), [])


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("http://127.0.0.1:8000", Address("http://127.0.0.1:8000", "http", "127.0.0.1", 8000)),
        ("ours=grpc://[::1]:50051", Address("ours", "grpc", "::1", 50051)),
    ],
)
def test_servers_are_named_by_door_and_address(text: str, address: Address) -> None:
    assert parse_target(text) == address


@pytest.mark.parametrize("text", ["127.0.0.1:8000", "https://host:1", "http://host", "http://:80", "http://host:99999"])
def test_what_names_no_server_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="names no server"):
        parse_target(text)


def test_a_server_that_is_not_there_is_an_error_not_a_figure(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main(["gone=http://127.0.0.1:1"]) == 1
    assert "error: gone cannot be reached at 127.0.0.1:1" in capsys.readouterr().err


def test_a_limit_is_the_best_that_was_seen() -> None:
    second = Limits(
        threads=2,
        read_one_thread=11.0,
        read=19.0,
        copy=6.0,
        gemm_float32=199.0,
        gemm_bfloat16=401.0,
        gemm_int8=999.0,
    )
    assert best_limits(LIMITS, second) == Limits(2, 11.0, 20.0, 6.0, 200.0, 401.0, 1000.0)


def test_limits_are_measured_and_written_with_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(limits, "READ_BYTES", 2**16)
    monkeypatch.setattr(limits, "_GEMM_SIZE", 32)
    threads = torch.get_num_threads()
    path = tmp_path / "results" / "limits.json"
    try:
        assert limits.main(["--threads", "1", "--seconds", "0", "--output", str(path)]) == 0
        assert measure_limits(threads=1, seconds=0).gemm_int8 > 0
    finally:
        torch.set_num_threads(threads)
    content = json.loads(path.read_text())
    assert content["machine"]["num_cores"] == describe_machine().num_cores
    assert all(content["limits"][name] > 0 for name in ("read", "copy", "gemm_float32", "gemm_bfloat16"))
    assert "read, 1 thread" in capsys.readouterr().out


def test_limits_are_sampled_on_either_side_of_each_round_of_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter([20.0, 30.0, 10.0, 15.0])
    asked: list[float] = []

    def measured(*, threads: int, seconds: float, memory: torch.Tensor) -> Limits:
        asked.append(seconds)
        return dataclasses.replace(LIMITS, threads=threads, read=next(rates), copy=float(len(memory)))

    monkeypatch.setattr(limits, "READ_BYTES", 2**16)
    monkeypatch.setattr(limits, "measure_limits", measured)
    probe = limits.LimitProbe(threads=2)
    assert probe.of_rounds() == []
    for workload in ("W1", "W1", "W1", "W2", "W2"):
        probe.again(workload)
    assert {name: [each.read for each in found] for name, found in probe.samples.items()} == {
        "W1": [20.0, 30.0, 10.0],
        "W2": [15.0],
    }
    assert [each.read for each in probe.of_rounds()] == [30.0, 30.0]
    assert {each.copy for each in probe.of_rounds()} == {2**13}
    assert max(asked) <= 0.1  # of each of six probes: a round must not wait long


def test_the_table_of_limits_tells_the_median_and_both_ends() -> None:
    samples = [dataclasses.replace(LIMITS, read=rate) for rate in (20.0, 30.0, 22.0)]
    assert limits.limits_table(samples).splitlines()[3].split() == [
        "read,",
        "2",
        "threads",
        "22.0",
        "20.0",
        "30.0",
        "GB/s",
    ]
    assert limits.limits_table([LIMITS]).splitlines()[3].split() == ["read,", "2", "threads", "20.0", "–", "–", "GB/s"]


@pytest.mark.parametrize(("text", "rate"), [("1.5", 1.5), ("vllm-w8a8", 1.57), ("openvino-int8", 1.05)])
def test_a_rate_is_a_number_or_a_peers(text: str, rate: float) -> None:
    assert planned("--rate", text).rate == rate


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "vllm"])
def test_what_is_no_rate_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        planned("--rate", text)
    assert f"{text!r} is neither a number above 0 nor one of vllm-w8a8, " in capsys.readouterr().err


def test_every_run_draws_a_seed_of_its_own_unless_it_is_given_one() -> None:
    assert len({planned().seed for _ in range(8)}) == 8
    assert planned("--seed", "7").seed == 7


def test_a_model_that_is_not_there_is_told_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve.main(["gone=http://127.0.0.1:1", "--model", str(tmp_path)]) == 1
    assert "has no config.json" in capsys.readouterr().err


def test_the_machine_is_described_without_naming_a_host() -> None:
    machine = describe_machine()
    assert machine.memory_bytes > 2**30
    assert machine.packages["torch"] == torch.__version__
    assert machine.python == sys.version.split()[0]


def test_every_kernel_is_set_beside_the_limit_that_bounds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "small", SMALL)
    for name, value in (("FEW_ROWS", (1,)), ("MANY_ROWS", (3,)), ("CONTEXTS", (32,)), ("READ_BYTES", 2**16)):
        monkeypatch.setattr(kernels, name, value)
    monkeypatch.setattr(kernel_steps, "_COLD_BYTES", 1)
    monkeypatch.setattr(kernels, "read_rate", lambda *_: 20.0)
    stored = dataclasses.replace(kernels.STORED[0], gemm_rate=lambda _: 400.0)
    results = kernels.measure_kernels(select("cpu"), names=["small"], stored=[stored], seconds=0)
    cells = [(each.kernel, each.size, each.unit, each.limit) for each in results]
    linears = [
        (layer, *cell)
        for layer in ("qkv", "o", "gate_up", "down")
        for cell in (("M = 1", "GB/s", 20.0), ("M = 3", "GOP/s", 400.0))
    ]
    assert cells == [
        *linears,
        ("attention", "1 × 1 at 32", "GB/s", 20.0),
        ("attention", "16 × 1 at 32", "GB/s", 20.0),
        ("attention", "prefill 32", "GOP/s", 400.0),
    ]
    first = results[0]
    assert first.rate == pytest.approx(64 * 128 * 2 / first.microseconds / 1e3)
    assert first.share == pytest.approx(first.rate / 20.0)
    assert kernels.kernels_table(results).splitlines()[2].split()[:3] == ["small", "bf16", "qkv"]


def test_a_kernel_is_shown_in_its_middle_turn_beside_the_best_limit_around_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Limits before, between and after three turns; seconds of a step of four calls in each.
    limits_seen, seconds = iter([10.0, 40.0, 20.0, 20.0]), iter([0.4e-6, 0.8e-6, 0.8e-6])
    monkeypatch.setattr(kernels, "best_s", lambda *_: next(seconds))
    step = KernelStep(lambda: torch.empty(0), num_calls=4)
    cell = kernels._Cell("small", "o", kernels.STORED[0], "M = 1", step, amount=2000.0, is_bound_by_memory=True)
    shown = cell.measure(lambda _: next(limits_seen), seconds=0.3)
    # 20 of 40, 10 of 40, 10 of 20 GB/s
    assert (shown.microseconds, shown.rate, shown.limit, shown.share) == pytest.approx((0.1, 20.0, 40.0, 0.5))


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(ServerEndedError, match=r"(?s)staffetta serve .* is not ready:.*MODEL_NOT_FOUND"):
        LocalServer("none", tmp_path / "none", ()).__enter__()


def test_a_real_server_is_measured_through_both_doors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    sizes = ["--prompt-tokens", "40", "--output-tokens", "6", "--concurrency", "2", "--requests", "4"]
    with LocalServer("http", Path("demo"), ("--threads", "1")) as server:
        doors = [server.target, f"grpc=grpc://{server.grpc}"]
        arguments = [*doors, *sizes, "--rounds", "2", "--vocab-size", "1024", "--output", str(path)]
        assert serve.main(arguments) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[2:4]] == [
        ["custom", "http"],
        ["custom", "grpc"],
    ]
    results = json.loads(path.read_text())["measurement"]["results"]
    assert [(result["phase"], result["target"], len(result["rounds"])) for result in results] == [
        ("custom", "http", 2),
        ("custom", "grpc", 2),
    ]
    for result in results:
        for figures in result["rounds"]:
            assert figures["output_tokens_per_s"] == pytest.approx(6 * figures["requests_per_s"])
            assert figures["ttft_p50_ms"] > 0
