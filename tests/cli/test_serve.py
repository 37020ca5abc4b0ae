"""`staffetta serve` as a process: starts, restarts, ends. Gateway and workers are stand-ins that start at once."""

import json
import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.cli.running_serve import DEADLINE_S, running_serve

ROLES = ["decode-0", "gateway", "prefill-0", "zygote"]


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A directory of short name, as Unix sockets need it."""
    with tempfile.TemporaryDirectory(prefix="st") as name:
        yield Path(name)


def test_the_ready_object_names_the_true_processes_and_the_hand_off(temporary: Path) -> None:
    with running_serve("--json", temporary=temporary) as serve:
        ready = serve.wait_until_ready()
        assert sorted(serve.children) == ROLES
        pids = {worker["name"]: worker["pid"] for worker in ready["workers"]}
        assert pids == {name: serve.children[name].pid for name in ("prefill-0", "decode-0")}
        assert [(w["num_blocks"], w["block_size"], w["pool_bytes"]) for w in ready["workers"]] == [
            (512, 16, 24 << 20)
        ] * 2
        assert ready["links"] == [
            {"prefill_worker": "prefill-0", "decode_worker": "decode-0", "transport": "shm", "bytes_per_s": 6.1e9}
        ]
        assert ready["self_test"]["prefill_worker"] == "prefill-0"
        serve.process.terminate()
        assert serve.wait_for_end() == 0


def test_one_interrupt_drains_gateway_first_then_workers(temporary: Path) -> None:
    with running_serve("--json", temporary=temporary) as serve:
        serve.wait_until_ready()
        groups = {os.getpgid(child.pid) for child in serve.children.values()}
        assert os.getpgid(serve.process.pid) not in groups, "the terminal's own interrupt would reach the children"
        serve.process.send_signal(signal.SIGINT)
        serve.wait_for_line("draining: running requests get 10 s; Ctrl-C again stops at once")
        serve.wait_for_line("gateway   │ drained")
        serve.wait_for_line("told to end")
        serve.wait_for_line("told to end")
        assert serve.wait_for_end() == 0


def test_secrets_are_on_no_command_line_in_no_environment_and_in_no_output(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "5ec2e7" * 8
    monkeypatch.setenv("STAFFETTA_CLUSTER_KEY", key)
    with running_serve("--json", "--log-level", "debug", temporary=temporary) as serve:
        ready = serve.wait_until_ready()
        for child in serve.children.values():
            assert key not in "".join(child.cmdline())
            assert key not in child.environ().values()
        serve.process.terminate()
        assert serve.wait_for_end() == 0
        assert key not in "".join(serve.lines) + str(ready)


def test_a_killed_worker_comes_back_under_its_name(temporary: Path) -> None:
    with running_serve("--json", temporary=temporary) as serve:
        serve.wait_until_ready()
        killed = serve.children["decode-0"]
        killed.kill()
        line = serve.wait_for_line("ended by SIGKILL")
        assert line == f"staffetta │ decode-0 (pid {killed.pid}) ended by SIGKILL; it starts again now"
        serve.wait_for_line("serving decode-0")
        assert serve.note_children()["decode-0"].pid != killed.pid
        assert serve.children["decode-0"].parent() == serve.children["zygote"]
        serve.process.send_signal(signal.SIGTERM)
        assert serve.wait_for_end() == 0


def test_a_killed_zygote_comes_back_with_all_its_workers(temporary: Path) -> None:
    with running_serve("--json", temporary=temporary) as serve:
        serve.wait_until_ready()
        before = serve.children
        before["zygote"].kill()
        serve.wait_for_line("zygote (pid")
        serve.wait_for_line("serving")
        serve.wait_for_line("serving")
        psutil.wait_procs([before["prefill-0"], before["decode-0"]], timeout=DEADLINE_S)
        assert sorted(serve.note_children()) == ROLES
        assert {before[name].pid for name in ROLES} & {serve.children[name].pid for name in ROLES} == {
            before["gateway"].pid
        }
        serve.process.send_signal(signal.SIGTERM)
        assert serve.wait_for_end() == 0


def test_a_killed_gateway_comes_back(temporary: Path) -> None:
    with running_serve("--json", temporary=temporary) as serve:
        serve.wait_until_ready()
        killed = serve.children["gateway"]
        killed.kill()
        serve.wait_for_line(f"gateway (pid {killed.pid}) ended by SIGKILL; it starts again now")
        serve.process.send_signal(signal.SIGTERM)
        assert serve.wait_for_end() == 0


def test_nothing_outlives_a_killed_supervisor(temporary: Path) -> None:
    with running_serve("--json", "--decode-failpoints", "ignore-term:on:1", temporary=temporary) as serve:
        serve.wait_until_ready()
        assert sorted(serve.children) == ROLES
        serve.process.kill()
        assert serve.wait_for_end() == -signal.SIGKILL


def test_the_drain_ends_what_does_not_end_itself(temporary: Path) -> None:
    with running_serve("--json", "--decode-failpoints", "ignore-term:on:1", temporary=temporary) as serve:
        serve.wait_until_ready()
        serve.process.send_signal(signal.SIGINT)
        serve.wait_for_line("decode-0  │ told to end")
        assert serve.wait_for_end() == 0


def test_a_second_interrupt_stops_at_once(temporary: Path) -> None:
    with running_serve("--once", "slow", "--drain-s", "1000", temporary=temporary) as serve:
        assert serve.process.stdout is not None
        assert serve.process.stdout.read(5) == "still"
        serve.note_children()
        serve.process.send_signal(signal.SIGINT)
        serve.process.send_signal(signal.SIGTERM)
        serve.wait_for_line("stopped at once; requests that were running are lost")
        assert serve.wait_for_end() == 1


def test_once_prints_nothing_but_the_answer(temporary: Path) -> None:
    with running_serve("--once", "hello", temporary=temporary) as serve:
        assert serve.process.stdout is not None
        assert serve.process.stdout.read() == "the answer\n"
        assert serve.wait_for_end() == 0
        serve.wait_for_line("relay  prefill-0 → decode-0 · 1.2 MiB over shm")


@pytest.mark.parametrize("code", [3, 5])
def test_a_workers_lasting_failure_is_serves_own(temporary: Path, code: int) -> None:
    with running_serve("--decode-failpoints", f"exit:on:{code}", temporary=temporary) as serve:
        assert serve.wait_for_end() == code
    assert [line for line in serve.lines if "error[" in line] == ["decode-0  │ error[FAKE]: as told"]


def test_a_worker_that_never_starts_is_given_up_after_three_attempts(temporary: Path) -> None:
    with running_serve("--decode-failpoints", "exit:on:1", temporary=temporary) as serve:
        serve.wait_for_line("error[CHILD_ENDED]: decode-0 ended by exit code 1")
        serve.wait_for_line("its last line: error[FAKE]: as told")
        serve.wait_for_line("fix: staffetta serve --log-level debug")
        assert serve.wait_for_end() == 1
        assert serve.lines.count("decode-0  │ error[FAKE]: as told") == 3


def test_a_zygote_with_threads_refuses_to_fork(temporary: Path) -> None:
    with running_serve("--worker-entry", "tests.cli.threaded_fake:worker_main", temporary=temporary) as serve:
        serve.wait_for_line("error[FORK_REFUSED]")
        serve.wait_for_line("the zygote has 2 threads")
        assert serve.wait_for_end() == 1


def test_a_taken_port_is_told_with_its_fix(temporary: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with running_serve("--http", address, temporary=temporary) as serve:
            serve.wait_for_line(f"error[PORT_IN_USE]: {address} is taken")
            assert serve.wait_for_line("fix: ") == "  fix: --http 127.0.0.1:0"
            assert serve.wait_for_end() == 5


def test_an_unknown_model_is_told_before_anything_starts(temporary: Path) -> None:
    with running_serve("--model", "nowhere/nothing", temporary=temporary) as serve:
        serve.wait_for_line("error[MODEL_NOT_FOUND]: there is no model 'nowhere/nothing'")
        assert serve.wait_for_end() == 4


def test_the_private_directory_goes_and_an_abandoned_one_is_cleared_away(temporary: Path) -> None:
    with running_serve("--json", temporary=temporary) as serve:
        serve.wait_until_ready()
        [directory] = temporary.glob("staffetta-*")
        assert directory.stat().st_mode & 0o777 == 0o700
        serve.process.kill()
        serve.wait_for_end()
    assert directory.is_dir(), "its owner was killed"
    with running_serve("--once", "hello", "--json", temporary=temporary) as serve:
        assert serve.process.stdout is not None
        answer = json.loads(serve.process.stdout.read())
        assert (answer["text"], answer["finish_reason"], answer["handoff_blocks"]) == ("the answer", "stop", 5)
        assert serve.wait_for_end() == 0
    assert list(temporary.iterdir()) == []
