"""The hand-off's bar: what it counts as added, when it is missed, and that a prompt took the way it is counted for."""

from pathlib import Path

import pytest

from staffetta.v1 import common_pb2, inference_pb2
from tests.bars.handoff_cost import Sample, Turn, added, report, sample_of, systems


def make_turn(*ttfts_ms: float) -> Turn:
    return Turn(tuple(Sample(ttft, 20.0, 2.0, 0.25, ttft - 2.25, 10.0) for ttft in ttfts_ms))


def make_finished(*, cached: int = 0, **handoff: str | int) -> inference_pb2.GenerateFinished:
    return inference_pb2.GenerateFinished(
        handoff=common_pb2.HandoffReport(**handoff),  # type: ignore[arg-type]
        usage=common_pb2.Usage(cached_tokens=cached),
        timings=common_pb2.PhaseTimings(gateway_s=0.25, queue_s=0.5, prefill_s=1.0, transfer_s=0.125),
    )


def test_what_is_added_is_a_share_of_the_colocated_median_of_the_same_round() -> None:
    turns = {
        "colocated": [make_turn(100.0, 90.0, 500.0), make_turn(200.0)],
        "shm": [make_turn(103.0), make_turn(190.0)],
    }
    assert added(turns, "shm") == pytest.approx([0.03, -0.05])


@pytest.mark.parametrize(
    ("shm_ms", "tcp_ms", "missed"),
    [
        (105.0, 110.0, []),
        (106.0, 110.0, ["bf16: shm adds 6.0 %, the bar is 5%"]),
        (105.0, 111.0, ["bf16: tcp adds 11.0 %, the bar is 10%"]),
    ],
)
def test_a_bar_is_missed_by_the_median_round_alone(
    shm_ms: float, tcp_ms: float, missed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    turns = {
        "colocated": [make_turn(100.0)] * 3,
        "shm": [make_turn(100.0), make_turn(shm_ms), make_turn(900.0)],
        "tcp": [make_turn(100.0), make_turn(tcp_ms), make_turn(900.0)],
    }
    assert report("bf16", turns) == missed
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-3:]]
    assert [row[0] for row in rows] == ["colocated", "shm", "tcp"]
    assert rows[1][1:5] == [f"{shm_ms}", "(100.0", "to", "900.0)"]


def test_a_sample_tells_what_the_client_saw_and_what_the_system_said() -> None:
    sample = sample_of("shm", 8.0, [8.5, 8.75, 9.0], make_finished(transport="shm"))
    assert sample == Sample(500.0, 250.0, 250.0, 500.0, 1000.0, 125.0)


@pytest.mark.parametrize(
    ("system", "finished"),
    [
        ("shm", make_finished(transport="tcp")),
        ("shm", make_finished()),
        ("colocated", make_finished(transport="shm")),
        ("shm", make_finished(transport="shm", prefill_cached_tokens=16)),
        ("colocated", make_finished(cached=16)),
    ],
)
def test_a_prompt_that_came_another_way_or_from_a_cache_is_no_sample(
    system: str, finished: inference_pb2.GenerateFinished
) -> None:
    with pytest.raises(RuntimeError, match=f"a prompt of {system} came over"):
        sample_of(system, 8.0, [8.5, 8.75], finished)


def test_every_system_but_the_colocated_must_hand_over() -> None:
    commands = {server.name: server.command for server in systems(Path("m"), threads=2)}
    assert list(commands) == ["colocated", "shm", "tcp"]
    assert "--prefill 0" in commands["colocated"]
    for transport in ("shm", "tcp"):
        assert f"--prefill 1 --no-local-prefill --transports {transport}" in commands[transport]
