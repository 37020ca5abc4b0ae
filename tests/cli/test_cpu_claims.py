"""Two that pin workers to the same CPUs are told so, for as long as both run."""

import errno
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cli.cpu_claims import claim_cpus
from cli.serve import shared_cpus
from tests.cli.running_serve import running_serve

_FIRST = 100_000 + 4 * os.getpid()
NUMBERS = range(_FIRST, _FIRST + 4)
"""Of CPUs that no machine has, and that no other process that runs these tests claims meanwhile."""


def test_who_comes_second_learns_which_cpus_are_taken() -> None:
    first, second, third, fourth = NUMBERS
    with claim_cpus([first, second]) as taken:
        assert taken == frozenset()
        with claim_cpus([second, third]) as taken_again:
            assert taken_again == {second}
            with claim_cpus([third, fourth]) as taken_by_both:
                assert taken_by_both == {third}


def test_a_claim_ends_with_its_block_and_with_its_process() -> None:
    code = (
        f"from cli.cpu_claims import claim_cpus\nwith claim_cpus({list(NUMBERS)}): print(end='x', flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.read(1) == b"x"
        with claim_cpus(NUMBERS) as taken:
            assert taken == frozenset(NUMBERS)
        other.kill()
    for _ in range(2):
        with claim_cpus(NUMBERS) as taken:
            assert taken == frozenset()


def test_claims_are_not_passed_on_to_children() -> None:
    with claim_cpus(NUMBERS):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with child, claim_cpus(NUMBERS) as taken:
        assert taken == frozenset()


def test_a_system_without_such_names_claims_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Socket:
        def __enter__(self) -> "Socket":
            return self

        def __exit__(self, *_: object) -> None:
            """Nothing is open."""

        def bind(self, name: str) -> None:
            raise FileNotFoundError(2, "No such file or directory", name)

    monkeypatch.setattr("socket.socket", lambda *_: Socket())
    with claim_cpus(NUMBERS) as taken:
        assert taken == frozenset()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EAFNOSUPPORT])
def test_where_the_system_refuses_a_claim_none_is_kept(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    make_socket, claims = socket.socket, list[socket.socket]()

    def limited(*arguments: int) -> socket.socket:
        if len(claims) == 2:
            raise OSError(number, os.strerror(number))
        claims.append(make_socket(*arguments))
        return claims[-1]

    with claim_cpus(NUMBERS[:1]), monkeypatch.context() as patch:
        patch.setattr("socket.socket", limited)
        with claim_cpus(NUMBERS) as taken:
            assert taken == {NUMBERS[0]}
            assert [claim.fileno() for claim in claims] == [-1, -1], "others need the descriptors more"


def test_serve_claims_only_cpus_that_it_may_use(tmp_path: Path) -> None:
    usable, missing = min(os.sched_getaffinity(0)), 10_000 + os.getpid() % 80_000  # a setting has five digits
    config = tmp_path / "staffetta.yaml"
    config.write_text(f"prefill:\n  cpus: ['{usable}', '{missing}']\n")
    with (
        claim_cpus([usable, missing]),
        tempfile.TemporaryDirectory(prefix="st") as short,  # as Unix sockets need it
        running_serve("--json", "--config", str(config), temporary=Path(short)) as serve,
    ):
        assert f"CPU {usable}: workers of another serve" in serve.wait_for_line("workers of another serve")
        serve.wait_until_ready()
        serve.process.terminate()
        assert serve.wait_for_end() == 0


def test_the_warning_names_the_cpus_and_others_to_use_instead() -> None:
    assert shared_cpus(frozenset({0, 1, 3}), others=frozenset({4, 5, 6})) == (
        "CPU 0-1,3: workers of another serve on this host are pinned to them, and both wait for each other; --pin "
        "takes the first CPUs that it may use: start one under `taskset -c 4-6`, or without --pin"
    )
    assert "`taskset -c CPUS`" in shared_cpus(frozenset({0}), others=frozenset())
