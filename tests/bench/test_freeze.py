"""Turns of real processes: who is stopped when, who runs afterwards whatever happened, and what is refused."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import freeze
from bench.freeze import Turns, parse_freezes
from bench.processes import cpu_seconds, process_tree, read_process
from bench.target import TargetError
from staffetta.exits import UsageError
from tests.bench.processes import parent_and_child, states

TICK_S = 2 / os.sysconf("SC_CLK_TCK")
"""The kernel counts user and system time in whole ticks each."""


def test_only_the_server_whose_turn_it_is_runs() -> None:
    with parent_and_child() as one, parent_and_child() as other:
        with Turns({"one": one[0], "other": other[0]}) as turns:
            assert states(*one, *other) == "TTTT"
            with turns.turn("one"):
                assert states(*one, *other) == "rrTT"
            with turns.turn("other"):
                assert states(*one, *other) == "TTrr"
            assert states(*one, *other) == "TTTT"
            assert turns.frozen == ("one", "other")
        assert states(*one, *other) == "rrrr"


def test_a_server_that_is_not_named_always_runs() -> None:
    with parent_and_child() as one, Turns({"one": one[0]}) as turns, turns.turn("other"):
        assert states(*one) == "TT"


@pytest.mark.parametrize("error", [TargetError("it broke"), KeyboardInterrupt()])
def test_everyone_runs_after_an_error_in_a_turn(error: BaseException) -> None:
    with parent_and_child() as one, parent_and_child() as other:
        with (
            pytest.raises(type(error)),
            Turns({"one": one[0], "other": other[0]}) as turns,
            turns.turn("one"),
        ):
            raise error
        assert states(*one, *other) == "rrrr"


def test_a_child_started_in_a_turn_is_stopped_after_it() -> None:
    starter = (
        "import subprocess, sys; input(); c = subprocess.Popen(['cat'], stdin=0); print(c.pid, flush=True); c.wait()"
    )
    command = [sys.executable, "-c", starter]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdin is not None and parent.stdout is not None
        with Turns({"one": parent.pid}) as turns:
            with turns.turn("one"):
                parent.stdin.write("\n")
                parent.stdin.flush()
                child = int(parent.stdout.readline())
            assert states(parent.pid, child) == "TT"
        assert states(parent.pid, child) == "rr"
        parent.stdin.close()


def test_a_child_runs_again_though_its_parent_was_killed_meanwhile() -> None:
    with parent_and_child() as (parent, child):
        with Turns({"one": parent}):
            os.kill(parent, signal.SIGKILL)
            while states(parent) != "-":
                time.sleep(0.001)
            assert states(child) == "T"
        while states(child) == "T":  # its input has ended, so it ends once it runs
            time.sleep(0.001)


def test_what_an_earlier_run_left_stopped_runs_in_its_turn() -> None:
    with parent_and_child() as one:
        for pid in one:
            os.kill(pid, signal.SIGSTOP)
        while states(*one) != "TT":
            time.sleep(0.001)
        with Turns({"one": one[0]}) as turns, turns.turn("one"):
            assert states(*one) == "rr"


def test_a_turn_of_a_server_that_has_ended_is_an_error() -> None:
    with parent_and_child() as (parent, _), Turns({"one": parent}) as turns:
        os.kill(parent, signal.SIGKILL)
        while states(parent) != "-":
            time.sleep(0.001)
        with pytest.raises(TargetError, match=f"the process {parent} of one has ended"), turns.turn("one"):
            pytest.fail("there is nobody to ask")


def test_a_process_that_does_not_stop_is_an_error_and_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freeze, "STOP_S", -1.0)
    with parent_and_child() as one:
        with pytest.raises(TargetError, match="has not stopped after"), Turns({"one": one[0]}):
            pass
        assert states(*one) == "rr"


def test_a_process_that_is_not_there_is_refused() -> None:
    with subprocess.Popen(["true"]) as ended:
        pass
    with pytest.raises(UsageError, match=f"one={ended.pid}: there is no process"):
        Turns({"one": ended.pid})


def test_a_process_of_another_user_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    with parent_and_child() as one, pytest.raises(UsageError, match=f"one={one[0]}: process {one[0]} is not yours"):
        Turns({"one": one[0]})


@pytest.mark.parametrize("pid", [os.getpid(), os.getppid()])
def test_nobody_stops_itself(pid: int) -> None:
    with pytest.raises(UsageError, match=f"this command descends from process {pid}"):
        Turns({"one": pid})


def test_servers_are_waited_for_until_they_are_at_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    spent = iter([0.0, 1.0, 1.5, 1.7, 1.7, 1.79])  # processor seconds at both ends of three looks of a second
    slept: list[float] = []
    monkeypatch.setattr(freeze, "cpu_seconds", lambda pids: next(spent) if list(pids) == [7, 8] else 0.0)
    monkeypatch.setattr(time, "sleep", slept.append)
    freeze.settle([7, 8])
    assert slept == [1.0, 1.0, 1.0]
    assert next(spent, None) is None


def test_servers_that_never_rest_are_not_waited_for_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count()
    monkeypatch.setattr(freeze, "cpu_seconds", lambda _: float(next(now)))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(now)))
    monkeypatch.setattr(time, "sleep", lambda _: None)
    freeze.settle([7])
    assert next(now) > freeze.SETTLE_S


def test_processor_time_is_that_of_all_descendants() -> None:
    busy = "import time\nwhile time.process_time() < 0.1: pass\n"
    child = f"{busy}print(flush=True); input()"
    parent = f"import subprocess, sys\n{busy}subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        with Turns({"one": process.pid}):
            own = [found.cpu_s for found in process_tree(process.pid)]
            assert len(own) == 2
            assert min(own) >= 0.1 - TICK_S
            assert cpu_seconds([process.pid]) == pytest.approx(sum(own))
        process.communicate("\n")
    found = read_process(os.getpid())
    assert found is not None
    assert 0.0 < found.cpu_s <= time.process_time() + TICK_S


def test_nobody_is_waited_for_where_nobody_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("slept"))
    freeze.settle([])


def test_servers_and_processes_are_named_together() -> None:
    assert parse_freezes(["a=12", "b=3"], ["a", "b", "c"]) == {"a": 12, "b": 3}


@pytest.mark.parametrize("texts", [["d=12"], ["a=12", "a=13"], ["a="], ["a=-1"], ["12"], ["a=x"]])
def test_what_names_no_server_and_process_is_refused(texts: list[str]) -> None:
    with pytest.raises(UsageError, match="names no server and process"):
        parse_freezes(texts, ["a", "b"])


def test_a_tree_lists_parents_before_children() -> None:
    with parent_and_child() as (parent, child):
        assert [each.pid for each in process_tree(parent)] == [parent, child]
        assert [each.parent for each in process_tree(parent)] == [os.getpid(), parent]
    assert process_tree(parent) == ()
    assert read_process(parent) is None


def test_a_command_may_be_named_like_a_line_of_stat(tmp_path: Path) -> None:
    path = tmp_path / "a) T 1 (b"
    path.symlink_to("/bin/cat")
    with subprocess.Popen([str(path)], stdin=subprocess.PIPE) as process:
        found = read_process(process.pid)
        assert found is not None
        assert (found.parent, found.state == "T") == (os.getpid(), False)
        assert process.stdin is not None
        process.stdin.close()


def test_a_process_named_in_no_encoding_hinders_nobody() -> None:
    rename = "import ctypes; ctypes.CDLL(None).prctl(15, b'\\xff)', 0, 0, 0); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", rename], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        found = read_process(process.pid)
        assert found is not None and found.parent == os.getpid()
        assert process.pid in [each.pid for each in process_tree(os.getpid())]
        process.stdin.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_is_ended_from_outside_lets_everyone_run(number: signal.Signals) -> None:
    """The server answers the first question and never another one."""
    server = """
import http.server, json, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        body = json.dumps({"data": [{"id": "m"}]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_POST(self):
        print("asked", flush=True)
        time.sleep(600)
found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(found.server_address[1], flush=True)
found.serve_forever()
"""
    with (
        parent_and_child() as idle,
        subprocess.Popen([sys.executable, "-c", server], stdout=subprocess.PIPE, text=True) as served,
    ):
        assert served.stdout is not None
        address = f"http://127.0.0.1:{int(served.stdout.readline())}"
        arguments = [f"a={address}", f"b={address}", "--freeze", f"b={idle[0]}", "--freeze", f"a={served.pid}"]
        with subprocess.Popen(
            [sys.executable, "-m", "bench.serve", *arguments], stderr=subprocess.PIPE, text=True
        ) as command:
            try:
                assert served.stdout.readline() == "asked\n"
                assert states(*idle, served.pid) == "TTr"
                command.send_signal(number)
                _, said = command.communicate(timeout=20)
            finally:
                command.kill()
        assert (command.returncode, said.splitlines()[-1]) == (1, "error: stopped before the end; every server runs")
        assert states(*idle, served.pid) == "rrr"
        served.kill()
