"""The process: starts light, tells its addresses, drains on the first signal and ends on the second."""

import json
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest

import demo
from gateway.app import Gateway
from gateway.model import SamplingDefaults, load_model
from staffetta.config.schema import GatewayConfig
from staffetta.exits import ModelNotFoundError, PortError, UsageError
from tests.gateway.running import CONFIG, asynchronous, demo_model

PROGRAM = """
import json, sys
from gateway.main import main
from staffetta.config.schema import GatewayConfig

def on_ready(ready):
    heavy = [name for name in ("torch", "numpy", "transformers", "pydantic") if name in sys.modules]
    print(json.dumps({"http": ready.http, "grpc": ready.grpc, "heavy": heavy}), flush=True)

raise SystemExit(main(GatewayConfig(http="127.0.0.1:0", grpc="127.0.0.1:0"), on_ready=on_ready))
"""


def start() -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_gateway_starts_light_listens_on_its_two_doors_only_and_ends_on_sigterm() -> None:
    with start() as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        assert ready["heavy"] == []
        listening = {
            f"127.0.0.1:{socket.laddr.port}"
            for socket in psutil.Process(process.pid).net_connections("inet")
            if socket.status == psutil.CONN_LISTEN
        }
        assert listening == {ready["http"], ready["grpc"]}
        assert httpx.get(f"http://{ready['http']}/health").status_code == 200
        assert httpx.get(f"http://{ready['http']}/ready").status_code == 503
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=10)
    assert process.returncode == 0
    assert "Traceback" not in log


def test_the_first_signal_drains_and_the_second_ends_at_once() -> None:
    with start() as process:
        assert process.stdout is not None
        address = json.loads(process.stdout.readline())["http"]
        host, _, port = address.rpartition(":")
        body = b'{"prompt": "x"}'
        with socket.create_connection((host, int(port))) as waiting:
            head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
            waiting.sendall(head.encode() + body)
            while 'num_requests_waiting{model_name="demo"} 1.0' not in httpx.get(f"http://{address}/metrics").text:
                pass
            process.send_signal(signal.SIGINT)
            while httpx.get(f"http://{address}/ready").json()["reason"] != "the gateway is draining":
                pass
            assert process.poll() is None
            begun = time.monotonic()
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=8) == 0
            assert time.monotonic() - begun < 8


def test_a_taken_port_is_the_operators_error_with_a_fix() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"

        @asynchronous
        async def start_on(config: GatewayConfig) -> None:
            gateway = Gateway(config, demo_model())
            try:
                await gateway.start()
            finally:
                await gateway.close()

        for field in ("http", "grpc"):
            with pytest.raises(PortError) as refusal:
                start_on(replace(CONFIG, **{field: address}))  # type: ignore[arg-type]
            assert refusal.value.fix == f"--{field} 127.0.0.1:0"


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"model": "/nowhere"}, ModelNotFoundError),
        ({"served_model_name": "a/b"}, UsageError),
        ({"max_model_len": 4096}, UsageError),
        ({"max_model_len": -1}, UsageError),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused_at_start(
    changes: dict[str, object], error: type[Exception]
) -> None:
    with pytest.raises(error):
        load_model(GatewayConfig(**changes))  # type: ignore[arg-type]


def copy_model(directory: Path, **files: str) -> Path:
    """The embedded model by links, with some of its files replaced."""
    for path in demo.MODEL_DIR.iterdir():
        (directory / path.name).symlink_to(path)
    for name, content in files.items():
        path = directory / name.replace("__", ".")
        path.unlink(missing_ok=True)
        path.write_text(content)
    return directory


def test_generation_defaults_come_from_the_model(tmp_path: Path) -> None:
    generation = '{"eos_token_id": [2, 5], "temperature": 0.6, "top_p": 0.9, "top_k": 20, "do_sample": true}'
    model = load_model(GatewayConfig(model=str(copy_model(tmp_path, generation_config__json=generation))))
    assert (model.defaults.temperature, model.defaults.top_p, model.defaults.top_k) == (0.6, 0.9, 20)
    assert model.eos_token_ids == {2, 5}
    assert model.name == tmp_path.name
    assert demo_model().defaults.temperature == 0.0


def test_a_model_that_says_it_is_greedy_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    generation = '{"do_sample": false, "temperature": 0.6, "min_p": 0.1, "repetition_penalty": 1.1}'
    model = load_model(GatewayConfig(model=str(copy_model(tmp_path, generation_config__json=generation))))
    assert model.defaults == SamplingDefaults(temperature=0.0, top_p=1.0, top_k=0, repetition_penalty=1.1)
    assert model.eos_token_ids == {2}
    assert caplog.messages == ["generation_config.json: min_p: of no effect here"]


@pytest.mark.parametrize(
    "files",
    [
        {"config__json": "{"},
        {"config__json": "[]"},
        {"config__json": '{"vocab_size": "many", "max_position_embeddings": 5}'},
        {"tokenizer__json": "{}"},
        {"chat_template__jinja": "{% if"},
    ],
)
def test_a_model_directory_that_is_not_whole_is_refused_at_start(tmp_path: Path, files: dict[str, str]) -> None:
    with pytest.raises(ModelNotFoundError):
        load_model(GatewayConfig(model=str(copy_model(tmp_path, **files))))
