"""compose.yaml without containers: its services run as processes, by its own commands, environment and health checks.

What differs from containers is only what containers provide: host names and ports are mapped to free ports of loopback,
the volume to a directory. A prompt that crosses proves that the services find one another by what the file says.
"""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
CONTAINER_PORTS = (8000, 50051, 50052, 50053)
VOLUME = "/run/staffetta"
HOST = "127.0.0.1"
DEADLINE_S = 60.0
KEY = "c0" * 32


def interpolate(text: str, variables: Mapping[str, str]) -> str:
    """Does what compose does with `$$`, `${X:-default}` and `${X:?message}`; raises ValueError for the last."""

    def value(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        name, operator, rest = match[1], match[2], match[3]
        if variables.get(name):
            return variables[name]
        if operator == ":?":
            raise ValueError(rest)
        return rest

    return re.sub(r"\$\$|\$\{(\w+)(:-|:\?)([^}]*)\}", value, text)


def load_services(**variables: str) -> dict[str, dict[str, Any]]:
    """The services, anchors merged and variables filled in."""

    def fill(node: Any) -> Any:
        if isinstance(node, str):
            return interpolate(node, variables)
        if isinstance(node, list):
            return [fill(item) for item in node]
        if isinstance(node, dict):
            return {key: fill(item) for key, item in node.items()}
        return node

    services: dict[str, dict[str, Any]] = fill(yaml.safe_load((ROOT / "compose.yaml").read_text())["services"])
    return services


class Service:
    """One service as a process."""

    def __init__(self, name: str, spec: dict[str, Any], *, ports: dict[str, dict[int, int]], volume: Path) -> None:
        self.name = name
        self._spec = spec
        self._ports = ports
        self._volume = volume
        settings = {key: self.map_to_host(str(value)) for key, value in spec["environment"].items()}
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("STAFFETTA_")}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = {**inherited, **settings, "PATH": path, "HOSTNAME": HOST}

    def map_to_host(self, text: str) -> str:
        """Container addresses and paths in `text` as this machine's."""

        def address(match: re.Match[str]) -> str:
            owner = "gateway" if match[1] == "gateway" else self.name
            host = "$HOSTNAME" if match[1] == "$HOSTNAME" else HOST
            return f"{host}:{self._ports[owner][int(match[2])]}"

        mapped = re.sub(r"(gateway|0\.0\.0\.0|127\.0\.0\.1|\$HOSTNAME):(\d+)", address, text)
        return mapped.replace(VOLUME, str(self._volume))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Runs the service's command; SIGTERM must end it as Docker's stop would."""
        argv = [
            self.map_to_host(word) for word in (*self._spec.get("entrypoint", ["staffetta"]), *self._spec["command"])
        ]
        process = subprocess.Popen(argv, env=self.environment)
        try:
            yield
            process.terminate()
            assert process.wait(timeout=DEADLINE_S) == 0
        finally:
            process.kill()
            process.wait()

    def wait_until_healthy(self) -> None:
        """Runs the health check as Docker would, until it succeeds."""
        kind, *words = self._spec["healthcheck"]["test"]
        assert kind == "CMD"
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            check = subprocess.run(
                [self.map_to_host(word) for word in words], env=self.environment, capture_output=True, check=False
            )
            if check.returncode == 0:
                return
        raise AssertionError(f"{self.name} is not healthy: {check.stdout!r} {check.stderr!r}")


def free_ports() -> dict[int, int]:
    """A free port of this machine for each of a container's."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server((HOST, 0))) for _ in CONTAINER_PORTS]
        return dict(zip(CONTAINER_PORTS, (s.getsockname()[1] for s in sockets), strict=True))


def test_a_prompt_crosses_services_that_run_as_the_file_says() -> None:
    specs = load_services(STAFFETTA_CLUSTER_KEY=KEY)
    ports = {name: free_ports() for name in specs}
    with tempfile.TemporaryDirectory(prefix="st") as volume, ExitStack() as stack:
        services = {name: Service(name, spec, ports=ports, volume=Path(volume)) for name, spec in specs.items()}
        for service in services.values():
            stack.enter_context(service.running())
        for name in ("prefill", "decode", "gateway"):
            services[name].wait_until_healthy()
        prompt = " ".join(f"The code of box {number} is {number * 37}." for number in range(12))
        door = f"{HOST}:{ports['gateway'][50051]}"
        asked = subprocess.run(
            [sys.executable, "-m", "cli.main", "ask", prompt, "--address", door, "--json", "--max-tokens", "4"],
            env=services["gateway"].environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert asked.returncode == 0, asked.stderr
        answer = json.loads(asked.stdout)
    assert (answer["prefill_worker"], answer["decode_worker"]) == (f"prefill-{HOST}", f"decode-{HOST}")
    assert answer["transport"] == "shm"
    assert answer["handoff_blocks"] > 0


def test_without_a_cluster_key_nothing_starts() -> None:
    with pytest.raises(ValueError, match="make one with openssl rand -hex 32"):
        load_services()


def test_the_file_holds_no_secret() -> None:
    keys = {
        str(service["environment"]["STAFFETTA_CLUSTER_KEY"])
        for service in load_services(STAFFETTA_CLUSTER_KEY=KEY).values()
    }
    assert keys == {KEY}
    assert re.findall(r"[0-9a-fA-F]{32,}", (ROOT / "compose.yaml").read_text()) == []


def test_only_the_gateways_doors_are_published_and_only_on_loopback() -> None:
    published = {name: spec.get("ports", []) for name, spec in load_services(STAFFETTA_CLUSTER_KEY=KEY).items()}
    assert published == {
        "gateway": ["127.0.0.1:8000:8000", "127.0.0.1:50051:50051"],
        "prefill": [],
        "decode": [],
    }


@pytest.mark.parametrize("name", ["gateway", "worker"])
def test_an_image_runs_as_nobody_in_particular_with_pinned_versions(name: str) -> None:
    lines = (ROOT / "deploy" / "docker" / f"{name}.Dockerfile").read_text().splitlines()
    instructions = [line for line in lines if line and not line.startswith(("#", " "))]
    final = instructions[max(n for n, line in enumerate(instructions) if line.startswith("FROM")) :]
    assert "USER staffetta" in final
    assert any(line.startswith("HEALTHCHECK") for line in final)
    installs = [line for line in instructions if "pip install" in line]
    assert all("-c constraints.txt" in line or line.endswith("torch==2.13.0") for line in installs)
    assert any("torch" in line for line in installs) == (name == "worker")


def test_a_worker_image_listens_where_it_is_probed() -> None:
    text = (ROOT / "deploy" / "docker" / "worker.Dockerfile").read_text()
    listens = dict(re.findall(r"(STAFFETTA_\w*LISTEN)=0\.0\.0\.0:(\d+)", text))
    exposed = re.findall(r"^EXPOSE (\d+) (\d+)$", text, re.MULTILINE)
    assert [tuple(listens[name] for name in ("STAFFETTA_LISTEN", "STAFFETTA_TRANSFER_LISTEN"))] == exposed
    assert f'"staffetta.rpc.probe", "127.0.0.1:{listens["STAFFETTA_LISTEN"]}"' in text


def test_containers_can_do_no_more_than_they_need() -> None:
    for spec in load_services(STAFFETTA_CLUSTER_KEY=KEY).values():
        assert (spec["read_only"], spec["cap_drop"], spec["security_opt"]) == (
            True,
            ["ALL"],
            ["no-new-privileges:true"],
        )
