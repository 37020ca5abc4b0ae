"""What `serve` decides to start."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cli.plan import ServePlan, Surroundings, dialable, plan_serve, plan_threads
from cli.serve import choose_registry
from staffetta.config.flags import FlagParser, add_settings
from staffetta.config.load import resolve
from staffetta.config.schema import DecodeConfig, GatewayConfig, PrefillConfig, ServeConfig
from staffetta.exits import UsageError

SURROUNDINGS = Surroundings(
    http="127.0.0.1:8000", grpc="127.0.0.1:50051", shm_dir="/run/st", cluster_key="ab" * 32, cpus=tuple(range(8))
)


def make_plan(
    *argv: str, environ: dict[str, str] | None = None, file: Path | None = None, around: Surroundings = SURROUNDINGS
) -> ServePlan:
    parser = FlagParser("serve", description="")
    add_settings(parser, ServeConfig)
    flags = parser.parse(argv)
    flags.config = str(file or "")
    environ = environ or {}
    no_flags = argparse.Namespace(config=flags.config)
    return plan_serve(
        resolve(ServeConfig, flags, environ=environ),
        gateway=resolve(GatewayConfig, no_flags, environ=environ),
        prefill=resolve(PrefillConfig, no_flags, environ=environ),
        decode=resolve(DecodeConfig, no_flags, environ=environ),
        surroundings=around,
    )


def test_by_default_one_worker_of_each_role_knows_everything_it_needs() -> None:
    plan = make_plan()
    assert [(worker.name, worker.role) for worker in plan.workers] == [("prefill-0", "prefill"), ("decode-0", "decode")]
    expected: dict[str, Any] = {
        "cluster_key": "ab" * 32,
        "log_level": "warning",
        "gateways": ("127.0.0.1:50051",),
        "shm_dir": "/run/st",
        "threads": 4,
    }
    assert plan.workers[0].config == PrefillConfig(worker_id="prefill-0", **expected)
    assert plan.workers[1].config == DecodeConfig(worker_id="decode-0", **expected)
    assert plan.gateway == GatewayConfig(cluster_key="ab" * 32, log_level="warning")


@pytest.mark.parametrize(
    ("argv", "environ", "num_processes"),
    [
        (("--gateway-workers", "3"), {}, 3),
        ((), {"STAFFETTA_GATEWAY_WORKERS": "4"}, 4),
        (("--gateway-workers", "2"), {"STAFFETTA_GATEWAY_WORKERS": "4"}, 2),
        (("--gateway-workers", "1"), {"STAFFETTA_GATEWAY_WORKERS": "4"}, 1),
    ],
)
def test_with_several_gateway_processes_workers_register_with_their_parent(
    argv: tuple[str, ...], environ: dict[str, str], num_processes: int
) -> None:
    around = replace(SURROUNDINGS, registry="127.0.0.1:50999")
    plan = make_plan(*argv, environ=environ, around=around)
    registry = "127.0.0.1:50999" if num_processes > 1 else "127.0.0.1:50051"
    assert (plan.gateway.workers, plan.registry) == (num_processes, registry)
    assert {worker.config.gateways for worker in plan.workers} == {(registry,)}
    assert (plan.gateway.http, plan.gateway.grpc) == (SURROUNDINGS.http, SURROUNDINGS.grpc)


@pytest.mark.parametrize(("num_processes", "has_port"), [("1", False), ("2", True)])
def test_a_port_for_the_registry_is_taken_only_where_it_has_one_of_its_own(num_processes: str, has_port: bool) -> None:
    parser = FlagParser("serve", description="")
    add_settings(parser, ServeConfig)
    serve = resolve(ServeConfig, parser.parse(("--gateway-workers", num_processes)), environ={})
    assert (choose_registry(serve, "") != "127.0.0.1:0") is has_port


def test_cores_are_shared_out_and_nobody_gets_none() -> None:
    def threads(*argv: str, num_cores: int) -> list[int]:
        around = Surroundings("h:1", "h:2", "/d", "ab" * 16, tuple(range(num_cores)))
        return [worker.config.threads for worker in make_plan(*argv, around=around).workers]

    assert threads(num_cores=1) == [1, 1]
    assert threads("--prefill", "2", num_cores=1) == [1, 1, 1]
    assert threads("--prefill", "0", num_cores=5) == [5]
    assert threads(num_cores=5) == [2, 2]
    assert threads("--prefill", "2", num_cores=9) == [3, 3, 3]
    assert threads("--threads", "3", num_cores=2) == [3, 3]
    assert make_plan(environ={"STAFFETTA_DECODE_THREADS": "5"}).max_threads == 5


def test_a_quota_of_processor_time_counts_as_fewer_cores() -> None:
    def threads(quota: float | None, *argv: str) -> list[int]:
        plan = make_plan(*argv, around=replace(SURROUNDINGS, cpu_quota=quota))
        assert (plan.num_cpus, plan.cpu_quota) == (8, quota)
        return [worker.config.threads for worker in plan.workers]

    assert threads(None) == [4, 4]
    assert threads(16.0) == [4, 4]
    assert threads(3.5) == [2, 2]
    assert threads(0.5) == [1, 1]
    assert threads(5.5, "--prefill", "0") == [6]
    assert threads(0.5, "--threads", "3") == [3, 3]


def test_where_cores_are_few_a_worker_computes_on_two_that_its_own_role_leaves_it() -> None:
    assert plan_threads(2, num_prefill=1, num_decode=1) == {"prefill": 2, "decode": 2}
    assert plan_threads(3, num_prefill=1, num_decode=1) == {"prefill": 2, "decode": 2}
    assert plan_threads(2, num_prefill=2, num_decode=1) == {"prefill": 1, "decode": 2}
    assert plan_threads(4, num_prefill=2, num_decode=4) == {"prefill": 2, "decode": 1}
    assert plan_threads(1, num_prefill=1, num_decode=1) == {"prefill": 1, "decode": 1}


def test_where_cores_suffice_no_two_workers_share_one() -> None:
    for num_cores in range(4, 65):
        for num_prefill in range(4):
            for num_decode in range(1, 5):
                if num_cores >= 2 * (num_prefill + num_decode):
                    threads = plan_threads(num_cores, num_prefill=num_prefill, num_decode=num_decode)
                    total = threads["prefill"] * num_prefill + threads["decode"] * num_decode
                    assert num_cores - (num_prefill + num_decode) < total <= num_cores


def test_pinned_workers_have_cpus_of_their_own() -> None:
    def cpus(*argv: str, around: Sequence[int] = range(8)) -> list[str]:
        plan = make_plan(*argv, around=replace(SURROUNDINGS, cpus=tuple(around)))
        return [",".join(worker.config.cpus) for worker in plan.workers]

    assert make_plan().pinned_cpus == frozenset()
    assert make_plan("--pin", "--threads", "1").pinned_cpus == {0, 1}
    assert cpus() == ["", ""]
    assert cpus("--pin") == ["0-3", "4-7"]
    assert cpus("--pin", around=[1, 2, 5, 6, 7]) == ["1-2", "5-6"]
    assert cpus("--pin", "--prefill", "2", "--threads", "2") == ["0-1", "2-3", "4-5"]
    with pytest.raises(UsageError, match="the workers compute with 10 threads") as refused:
        cpus("--pin", "--threads", "5")
    assert "--threads 4" in refused.value.fix


def test_a_roles_own_setting_beats_serves_unless_serve_has_a_flag(tmp_path: Path) -> None:
    file = tmp_path / "f.yaml"
    file.write_text(
        "common: {block_size: 32}\nserve: {max_sequences: 5}\nprefill: {max_batch_tokens: 1024, drain_s: 3}\n"
    )
    environ = {"STAFFETTA_DECODE_BLOCK_SIZE": "64", "STAFFETTA_MAX_SEQUENCES": "6"}

    def values(*argv: str) -> list[tuple[int, int, int]]:
        workers = make_plan(*argv, environ=environ, file=file).workers
        return [(w.config.block_size, w.config.max_sequences, w.config.max_batch_tokens) for w in workers]

    assert values() == [(32, 6, 1024), (64, 6, 512)]
    assert values("--max-batch-tokens", "7", "--block-size", "8") == [(8, 6, 7), (8, 6, 7)]
    assert [worker.config.drain_s for worker in make_plan(file=file).workers] == [3.0, 10.0]


def test_addresses_written_for_other_hosts_do_not_count_here() -> None:
    environ = {"STAFFETTA_LISTEN": "0.0.0.0:1", "STAFFETTA_GATEWAYS": "g:1", "STAFFETTA_DECODE_SHM_DIR": "/elsewhere"}
    config = make_plan(environ=environ).workers[1].config
    assert (config.listen, config.gateways, config.shm_dir) == ("127.0.0.1:0", ("127.0.0.1:50051",), "/run/st")


def test_no_local_prefill_is_never() -> None:
    configs = {worker.role: worker.config for worker in make_plan("--no-local-prefill").workers}
    assert isinstance(configs["decode"], DecodeConfig)
    assert configs["decode"].local_prefill == "never"


def test_faults_go_to_the_role_they_are_meant_for() -> None:
    workers = make_plan("--prefill-failpoints", "a:kill:1", "--decode-failpoints", "b:stop:2").workers
    assert [worker.config.failpoints for worker in workers] == [("a:kill:1",), ("b:stop:2",)]


def test_a_log_level_that_was_asked_for_reaches_everybody() -> None:
    plan = make_plan("--log-level", "debug")
    assert {plan.gateway.log_level, *(worker.config.log_level for worker in plan.workers)} == {"debug"}


def test_a_listener_on_all_interfaces_is_dialled_on_loopback() -> None:
    addresses = ["0.0.0.0:1", "[::]:2", "10.0.0.1:3", "[::1]:4"]
    assert [dialable(address) for address in addresses] == ["127.0.0.1:1", "[::1]:2", "10.0.0.1:3", "[::1]:4"]
