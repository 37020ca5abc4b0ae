"""The command's verbs as a person meets them: output, exit codes, errors."""

import asyncio
import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from cli import main as command
from staffetta import __version__
from staffetta.errors import DeadlineError, QueueFullError, StaffettaError, UnknownModelError
from staffetta.exits import ExitCode, run
from staffetta.rpc.probe import main as probe_main
from staffetta.rpc.server import RpcServer
from staffetta.rpc.status import abort
from staffetta.v1 import inference_pb2, inference_pb2_grpc
from tests.cli.fakes import make_delta, make_finished

ERRORS: dict[str, StaffettaError] = {
    "full": QueueFullError("64 requests wait, 64 may"),
    "model": UnknownModelError("no model is called x"),
    "late": DeadlineError("the deadline passed during prefill"),
}


class EchoGateway(inference_pb2_grpc.InferenceServiceServicer):
    """Answers with what it was asked, or fails as it was asked to; keeps the requests."""

    def __init__(self) -> None:
        self.requests: list[inference_pb2.GenerateRequest] = []

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Any) -> Any:  # noqa: N802 (the wire's name)
        self.requests.append(request)
        text = request.text or request.chat.messages[-1].content
        if text in ERRORS:
            await abort(context, ERRORS[text])
        yield make_delta(text.upper())
        if text != "cut":
            yield inference_pb2.GenerateResponse(finished=make_finished())


class Door:
    """A gRPC server on a loop of its own thread."""

    def __init__(self) -> None:
        self.gateway = EchoGateway()  # type: ignore[abstract]  # the other calls are not made
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        self.server, self.address = self.do(self._start())

    def do(self, work: Any) -> Any:
        """Runs a coroutine on the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout=10)

    async def _start(self) -> tuple[RpcServer, str]:
        server = RpcServer(())
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self.gateway, server.grpc)
        return server, await server.start("127.0.0.1:0")

    def close(self) -> None:
        self.do(self.server.stop(grace_s=0.0))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@pytest.fixture
def door() -> Iterator[Door]:
    door = Door()
    yield door
    door.close()


def run_command(*argv: str) -> int:
    return run(lambda: command.run_command(argv))


def test_alone_the_command_shows_its_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ((), ("--help",)):
        assert run_command(*argv) == 0
        output = capsys.readouterr().out
        assert [line.split()[0] for line in output.splitlines() if line.startswith("  ")][:-1] == list(command.VERBS)


def test_the_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("--version") == 0
    assert capsys.readouterr().out == f"staffetta {__version__}\n"


@pytest.mark.parametrize("verb", ["serve", "gateway", "prefill", "decode", "chat", "ask"])
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_command(verb, "--help")
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: staffetta {verb}")


MISTAKES = [
    (("serv",), 2, "error[UNKNOWN_SETTING]: there is no verb 'serv'"),
    (("prefill", "--max-batch", "x"), 2, "error[UNKNOWN_SETTING]: staffetta prefill has no flag --max-batch"),
    (("decode", "--threads", "x"), 2, "error[BAD_VALUE]: --threads: 'x'"),
    (("gateway", "--http", "8000"), 2, "error[BAD_VALUE]: --http: '8000'"),
    (("ask",), 2, "error[USAGE]: the following arguments are required: PROMPT"),
    (("config",), 2, "error[USAGE]: which role's settings?"),
    (("config", "show", "gatewya"), 2, "error[USAGE]: which role's settings?"),
    (("gateway",), 2, "error[CLUSTER_KEY_MISSING]: gateway has no cluster_key"),
    (("prefill",), 2, "error[CLUSTER_KEY_MISSING]: prefill has no cluster_key"),
    (("decode",), 2, "error[CLUSTER_KEY_MISSING]: decode has no cluster_key"),
    (("decode", "--transports", "bogus"), 2, "error[BAD_VALUE]: --transports: 'bogus'"),
    (("serve", "--decode-failpoints", "foo"), 2, "error[BAD_VALUE]: --decode-failpoints: 'foo'"),
    (("serve", "--block-size", "2000"), 2, "error[BAD_VALUE]: --block-size: '2000'"),
    (("serve", "no/such"), 4, "error[MODEL_NOT_FOUND]: there is no model 'no/such'"),
    (("serve", "tests"), 4, "error[MODEL_INCOMPLETE]: tests is not a complete model directory"),
    (("serve", "--http", "1.2.3.4:80"), 5, "error[BAD_ADDRESS]: 1.2.3.4:80 cannot be listened on"),
    (("ask", "hi", "--address", "127.0.0.1:1"), 5, "error[PEER_UNREACHABLE]: no gateway answers at 127.0.0.1:1"),
]


@pytest.mark.parametrize(("argv", "code", "first_line"), MISTAKES)
def test_a_mistake_is_three_lines_and_a_code(
    argv: tuple[str, ...], code: int, first_line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(*argv) == code
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert (len(lines), captured.out) == (3, "")
    assert lines[0].startswith(first_line)
    assert lines[2].startswith("  fix: ")


FIXES = [
    (("serv",), "staffetta serve"),
    (("serve", "--prefil", "2"), "staffetta serve --prefill 1"),
    (("ask", "hi", "--adress", "x"), "staffetta ask --address 127.0.0.1:50051"),
    (("ask", "hi", "--address", "127.0.0.1:1"), "staffetta serve demo"),
]


@pytest.mark.parametrize(("argv", "fix"), FIXES)
def test_a_fix_is_a_line_to_paste(argv: tuple[str, ...], fix: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_command(*argv)
    assert capsys.readouterr().err.splitlines()[-1] == f"  fix: {fix}"


def test_config_show_is_about_serve_unless_a_role_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("config", "show", "serve", "--origin", "--decode", "2") == 0
    named = capsys.readouterr().out
    assert run_command("config", "show", "--origin", "--decode", "2") == 0
    assert capsys.readouterr().out == named
    assert " ".join(next(line for line in named.splitlines() if line.startswith("decode ")).split()) == (
        "decode 2 flag --decode"
    )
    assert run_command("config", "show") == 0
    assert "default" not in capsys.readouterr().out


def test_config_show_names_values_and_origins_and_hides_secrets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAFFETTA_CLUSTER_KEY", "5ec2e7" * 8)
    assert run_command("config", "show", "prefill", "--origin", "--threads", "3") == 0
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in capsys.readouterr().out.splitlines()}
    assert lines["threads"] == "3 flag --threads"
    assert lines["cluster_key"] == "(not shown) environment STAFFETTA_CLUSTER_KEY"
    assert lines["kv_memory"] == "64MiB default"
    assert run_command("config", "show", "prefill", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["role"] == "prefill"
    assert shown["settings"]["cluster_key"]["value"] == "(not shown)"
    assert shown["settings"]["block_size"] == {"value": "16", "origin": {"kind": "default", "where": ""}}


def test_ask_streams_the_answer_and_tells_its_relay(door: Door, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("ask", "hi", "--address", door.address, "--system", "be short", "--temperature", "0", "--seed", "7")
    assert run_command(*argv) == 0
    answer, relay = capsys.readouterr().out.splitlines()
    assert answer == "HI"
    assert relay.startswith("  relay  prefill-0 → decode-0 · 1.2 MiB over shm · first token ")
    [request] = door.gateway.requests
    assert [(m.role, m.content) for m in request.chat.messages] == [("system", "be short"), ("user", "hi")]
    assert (request.sampling.temperature, request.sampling.seed) == (0.0, 7)
    assert not request.sampling.HasField("top_p")


def test_ask_takes_plain_text_from_standard_input_and_answers_in_json(
    door: Door, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("piped"))
    assert run_command("ask", "-", "--address", door.address, "--prompt-as", "text", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["text"], answer["transport"], answer["completion_tokens"]) == ("PIPED", "shm", 2)
    assert door.gateway.requests[0].text == "piped"


FAILURES = [
    ("full", ExitCode.FAILURE, "error[QUEUE_FULL]: 64 requests wait, 64 may"),
    ("model", ExitCode.MODEL_NOT_FOUND, "error[UNKNOWN_MODEL]: no model is called x"),
    ("late", ExitCode.FAILURE, "error[DEADLINE_EXCEEDED]: the deadline passed during prefill"),
    ("cut", ExitCode.FAILURE, "error[INCOMPLETE]: the answer has no end"),
]


@pytest.mark.parametrize(("prompt", "code", "first_line"), FAILURES)
def test_a_failed_answer_is_told_by_its_reason(
    door: Door, prompt: str, code: ExitCode, first_line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("ask", prompt, "--address", door.address) == code
    assert capsys.readouterr().err.splitlines()[0] == first_line


def test_a_chat_sends_all_turns_before_each_line(
    door: Door, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\n"))
    assert run_command("chat", "--address", door.address, "--json") == 0
    assert [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()] == ["ONE", "TWO"]
    assert [(m.role, m.content) for m in door.gateway.requests[1].chat.messages] == [
        ("user", "one"),
        ("assistant", "ONE"),
        ("user", "two"),
    ]


def test_a_chat_goes_on_after_a_refusal_with_the_turns_before_it(
    door: Door, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\nfull\ntwo\n"))
    assert run_command("chat", "--address", door.address, "--json") == ExitCode.OK
    captured = capsys.readouterr()
    assert [json.loads(line)["text"] for line in captured.out.splitlines()] == ["ONE", "TWO"]
    assert captured.err.splitlines()[0] == "error[QUEUE_FULL]: 64 requests wait, 64 may"
    assert [m.content for m in door.gateway.requests[2].chat.messages] == ["one", "ONE", "two"]


def test_a_chats_exit_code_is_that_of_its_last_line(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\nmodel\n"))
    assert run_command("chat", "--address", door.address, "--json") == ExitCode.MODEL_NOT_FOUND


def test_the_probe_says_whether_a_server_serves(door: Door, capsys: pytest.CaptureFixture[str]) -> None:
    assert probe_main([door.address]) == ExitCode.PORT_OR_PEER
    door.do(door.server.set_serving())
    assert probe_main([door.address]) == ExitCode.OK
    assert probe_main([door.address, "--service", "none.such"]) == ExitCode.PORT_OR_PEER
    assert probe_main(["127.0.0.1:1"]) == ExitCode.PORT_OR_PEER
    said = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert said == ["NOT_SERVING", "SERVING", "NOT_FOUND", "UNAVAILABLE"]


def test_help_imports_nothing_heavy() -> None:
    heavy = ("grpc", "torch", "yaml", "numpy", "asyncio", "demo", "gateway", "engine", "google")
    code = (
        "import sys; from cli.main import run_command; run_command(['--help']);"
        f"print(*[name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""
