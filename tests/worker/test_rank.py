"""A rank is built, or the operator is told what does not fit and how to fix it."""

import logging
import os
from pathlib import Path
from typing import Any

import pytest

from demo import MODEL_DIR
from engine.request import StepOutput
from staffetta.config.schema import PrefillConfig
from staffetta.exits import DoesNotFitError, ModelNotFoundError, UsageError, run
from staffetta.v1 import common_pb2
from worker.headroom import Headroom
from worker.pool_pages import PoolPages
from worker.rank import Rank, load_rank, open_exporters

PREFILL, DECODE = common_pb2.WORKER_ROLE_PREFILL, common_pb2.WORKER_ROLE_DECODE


def make_config(**settings: Any) -> PrefillConfig:
    values: dict[str, Any] = {"threads": 1, "num_blocks": 4, "transports": ("loopback",)}
    return PrefillConfig(**values | settings)


def start(rank: Rank) -> None:
    def ignore(_: StepOutput | BaseException) -> None:
        """Nothing is computed here."""

    rank.start(source=None, on_output=ignore, on_failure=ignore)


def code_of(config: PrefillConfig) -> int:
    """The exit code of a command that builds such a rank."""

    def command() -> int:
        rank = load_rank(config, PREFILL)
        try:
            start(rank)
        finally:
            rank.stop()
        return 0

    return run(command)


def test_a_rank_knows_its_identity_and_bounds() -> None:
    rank = load_rank(make_config(cluster_key="ab" * 16), DECODE)
    assert (rank.num_blocks, rank.request_limits.max_model_len) == (4, 64)
    assert rank.identity.worker_id.startswith("decode-")
    assert (rank.identity.model, rank.identity.role) == ("demo", DECODE)
    assert rank.identity.layout.layout_id == rank.layout.layout_id
    assert len(rank.memory.buffer) == 4 * rank.layout.page_bytes
    start(rank)
    assert rank.engine_thread.call(lambda engine: engine.counts()).result().total_blocks == 4
    rank.stop()


def test_the_engine_keeps_to_the_cpus_that_it_is_given_and_the_rest_of_the_process_does_not() -> None:
    usable = os.sched_getaffinity(0)
    last = max(usable)
    rank = load_rank(make_config(cpus=(str(last),), threads=0), DECODE)
    start(rank)
    assert rank.engine_thread.call(lambda _: os.sched_getaffinity(0)).result() == {last}
    assert os.sched_getaffinity(0) == usable
    rank.stop()


def test_a_cpu_that_the_process_may_not_use_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="--cpus names 99998-99999"):
        load_rank(make_config(cpus=("0", "99998-99999")), DECODE)
    with pytest.raises(UsageError, match="--threads 2 on 1 CPUs"):
        load_rank(make_config(cpus=(str(min(os.sched_getaffinity(0))),), threads=2), DECODE)


@pytest.mark.parametrize(
    ("threads", "quota", "computes_on", "told"),
    [
        (0, 0.3, "1 threads", ""),
        (0, None, f"{len(os.sched_getaffinity(0))} threads", ""),
        (1, 0.3, "1 threads", ""),
        (3, 1.5, "3 threads", "3 threads use up the control group's quota of 1.5 CPUs"),
    ],
)
def test_threads_are_as_many_as_a_quota_runs_unless_the_operator_says_otherwise(
    threads: int,
    quota: float | None,
    computes_on: str,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("worker.rank.cpu_quota", lambda: quota)
    caplog.set_level(logging.INFO)
    load_rank(make_config(threads=threads), DECODE).stop()
    assert f"computes on {computes_on}" in caplog.text
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == bool(told)
    assert told in "".join(warnings)


def test_what_a_control_group_leaves_bounds_weights_and_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.rank.headroom", lambda: Headroom(2**20, "bytes are left of a group's"))
    with pytest.raises(DoesNotFitError) as raised:
        load_rank(make_config(), PREFILL)
    assert (raised.value.name, raised.value.why) == ("MODEL_TOO_LARGE", f"{2**20} bytes are left of a group's")


def test_a_rank_of_the_directory_it_is_in_has_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(MODEL_DIR)
    rank = load_rank(make_config(model="."), DECODE)
    assert rank.identity.model == MODEL_DIR.name
    rank.stop()


def test_two_ranks_of_one_model_have_equal_digests_and_other_incarnations() -> None:
    ranks = [load_rank(make_config(), role) for role in (PREFILL, DECODE)]
    first, second = (rank.identity for rank in ranks)
    assert first.model_digest == second.model_digest
    assert first.numerics_digest == second.numerics_digest
    assert first.layout == second.layout
    assert first.incarnation != second.incarnation
    for rank in ranks:
        rank.stop()


def test_a_pool_without_room_for_a_block_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(num_blocks=0, kv_memory=1000)
    with pytest.raises(DoesNotFitError) as raised:
        load_rank(config, PREFILL)
    assert raised.value.name == "KV_POOL_TOO_SMALL"
    assert code_of(config) == 3
    assert "the KV pool of 1000 bytes holds no block" in capsys.readouterr().err


def test_a_pool_beyond_the_memory_there_is_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(num_blocks=2**30)
    with pytest.raises(DoesNotFitError) as raised:
        load_rank(config, PREFILL)
    assert raised.value.name == "KV_POOL_TOO_LARGE"
    assert raised.value.fix.startswith("--num-blocks ")
    assert code_of(config) == 3
    assert "bytes of memory are available" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        load_rank(make_config(model=str(tmp_path)), PREFILL)


def test_a_transport_that_cannot_be_offered_is_left_out_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    rank = load_rank(make_config(transports=("shm", "loopback"), shm_dir=str(tmp_path / "missing")), PREFILL)
    exporters = open_exporters(rank)
    assert [exporter.transport for exporter in exporters] == ["loopback"]
    assert "transport shm is not offered" in caplog.text
    for exporter in exporters:
        exporter.close()
    rank.stop()


@pytest.mark.parametrize("transports", [(), ("carrier pigeon",), ("tcp",)])
def test_without_any_transport_there_is_no_worker(transports: tuple[str, ...]) -> None:
    rank = load_rank(make_config(transports=transports, transfer_listen="192.0.2.1:1"), PREFILL)
    with pytest.raises(UsageError) as raised:
        open_exporters(rank)
    assert raised.value.name == "NO_TRANSPORT"
    rank.stop()


def test_a_rank_touches_its_pool_until_it_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Pages(PoolPages):
        def start(self) -> None:
            done.append("start")

        def stop(self) -> None:
            done.append(f"stop while {rank.memory.is_shareable}")

    monkeypatch.setattr("worker.rank.PoolPages", Pages)
    rank = load_rank(make_config(), DECODE)
    start(rank)
    assert done == []
    rank.touch_pool()
    rank.stop()
    assert done == ["start", "stop while True"]
