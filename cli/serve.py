"""`staffetta serve MODEL`: gateway, prefill and decode workers on this machine, from start to ready to end.

1. Settings are resolved, the model is found, ports are looked at: mistakes are told before anything starts.
2. The supervisor starts everything. 3. Every worker is registered and linked. 4. A self-test goes through both roles.
5. The ready block; with the embedded model, one sample answer; or with `--once`, the answer that was asked for.
6. Ctrl-C: running requests get `drain_s`; again: everything ends at once.
"""

import argparse
import asyncio
import os
import secrets
import signal
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from cli.cpu_claims import claim_cpus
from cli.model import find_model
from cli.output import Output, say
from cli.plan import ServePlan, Surroundings, dialable, num_gateway_processes, plan_serve
from cli.ports import choose_port
from cli.runtime_dir import private_directory
from cli.supervisor import ChildRefusedError, Entries, Supervisor
from demo import EMBEDDED
from staffetta.config.load import Loaded, resolve
from staffetta.config.schema import DecodeConfig, GatewayConfig, PrefillConfig, ServeConfig
from staffetta.control_groups import cpu_quota
from staffetta.cpus import format_cpus
from staffetta.exits import ExitCode

T = TypeVar("T")


class StoppedError(Exception):
    """The operator asked for the end while something was waited for."""


class StopRequests:
    """Counts the operator's wishes to stop: Ctrl-C, SIGTERM, a closed terminal."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()

    def install(self) -> None:
        """Takes the signals over for as long as the event loop runs."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        (self.second if self.first.is_set() else self.first).set()


def run_serve(flags: argparse.Namespace, *, output: Output, entries: Entries | None = None) -> int:
    """Serves until stopped. Raises OperatorError for what cannot be served."""
    started = time.monotonic()
    loaded = resolve(ServeConfig, flags)
    config = loaded.config
    find_model(config.model)
    with private_directory() as directory:
        surroundings = Surroundings(
            http=choose_port(config.http, "--http"),
            grpc=choose_port(config.grpc, "--grpc"),
            shm_dir=str(directory),
            cluster_key=config.cluster_key or secrets.token_hex(32),
            cpus=tuple(sorted(os.sched_getaffinity(0))),
            registry=choose_registry(loaded, flags.config),
            cpu_quota=cpu_quota(),
        )
        plan = make_plan(loaded, flags.config, surroundings)
        session = _Serve(config, plan, output=output, started=started)
        with claim_cpus(sorted(plan.pinned_cpus.intersection(surroundings.cpus))) as shared:
            if shared:
                say(shared_cpus(shared, others=frozenset(surroundings.cpus) - plan.pinned_cpus))
            return asyncio.run(session.run(entries or Entries()))


def shared_cpus(shared: frozenset[int], *, others: frozenset[int]) -> str:
    """What is said of CPUs that another `serve` pins workers to as well; `others` could be used instead."""
    instead = f"taskset -c {','.join(format_cpus(others))}" if others else "taskset -c CPUS"
    return (
        f"CPU {','.join(format_cpus(shared))}: workers of another serve on this host are pinned to them, and both wait "
        f"for each other; --pin takes the first CPUs that it may use: start one under `{instead}`, or without --pin"
    )


def choose_registry(serve: Loaded[ServeConfig], config_file: str) -> str:
    """Where workers register with a gateway of several processes; with one nobody takes a port for it."""
    gateway = resolve(GatewayConfig, argparse.Namespace(config=config_file))
    several = num_gateway_processes(serve, gateway) > 1
    return choose_port("127.0.0.1:0", "--gateway-workers") if several else "127.0.0.1:0"


def make_plan(serve: Loaded[ServeConfig], config_file: str, surroundings: Surroundings) -> ServePlan:
    """The children of `serve`; their own parts of file and environment count where no flag of serve overrules them."""
    no_flags = argparse.Namespace(config=config_file)
    return plan_serve(
        serve,
        gateway=resolve(GatewayConfig, no_flags),
        prefill=resolve(PrefillConfig, no_flags),
        decode=resolve(DecodeConfig, no_flags),
        surroundings=surroundings,
    )


class _Serve:
    """One run of the verb. Event loop only."""

    def __init__(self, config: ServeConfig, plan: ServePlan, *, output: Output, started: float) -> None:
        self._config = config
        self._plan = plan
        self._output = output
        self._started = started
        self._stops = StopRequests()

    async def run(self, entries: Entries) -> int:
        """Starts, serves, ends; the command's exit code."""
        self._stops.install()
        supervisor = Supervisor(self._plan, entries=entries, say=say)
        supervisor.start()
        try:
            return await self._serve(supervisor)
        except StoppedError:
            return ExitCode.FAILURE  # stopped before it had done what it was started for
        except ChildRefusedError as refused:
            return refused.code
        finally:
            if not await self._end(supervisor):
                say("stopped at once; requests that were running are lost")

    async def _serve(self, supervisor: Supervisor) -> int:
        # Only now: the children import what they need meanwhile.
        from cli.client import Client
        from cli.opening import answer_once, become_ready, show_sample
        from cli.report import ready_block, ready_json

        config, plan = self._config, self._plan
        async with Client(dialable(plan.gateway.grpc)) as client, Client(dialable(plan.registry)) as registry:
            opening = become_ready(
                client, registry, config=config, plan=plan, pid_of=supervisor.pid_of, started=self._started
            )
            facts = await self._watch(supervisor, opening)
            supervisor.mark_ready()
            if config.once:
                await self._watch(supervisor, answer_once(client, config.once, self._output))
                return ExitCode.OK
            print(ready_json(facts) if self._output is Output.JSON else ready_block(facts), flush=True)
            if config.model == EMBEDDED and self._output is Output.TEXT:
                await self._watch(supervisor, show_sample(client))
        try:
            await self._watch(supervisor, asyncio.Event().wait())
        except StoppedError:
            say(f"draining: running requests get {self._config.drain_s:g} s; Ctrl-C again stops at once")
        return ExitCode.OK

    async def _watch(self, supervisor: Supervisor, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`; raises StoppedError or the supervisor's failure when that comes first."""
        task = asyncio.create_task(work)
        stop = asyncio.create_task(self._stops.first.wait())
        try:
            await asyncio.wait({task, stop, supervisor.failure}, return_when=asyncio.FIRST_COMPLETED)
            if supervisor.failure.done():
                raise supervisor.failure.result()
            if not task.done():
                raise StoppedError
            return task.result()
        finally:
            for pending in (task, stop):
                pending.cancel()
            await asyncio.gather(task, stop, return_exceptions=True)

    async def _end(self, supervisor: Supervisor) -> bool:
        """Ends every child; True when in order, False when a second request cut that short."""
        drain = asyncio.create_task(supervisor.drain(self._config.drain_s))
        hurry = asyncio.create_task(self._stops.second.wait())
        await asyncio.wait({drain, hurry}, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if drain.done():
            await drain
            return True
        drain.cancel()
        await supervisor.kill()
        return False
