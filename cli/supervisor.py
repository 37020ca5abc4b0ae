"""Keeps the processes of `staffetta serve` running: one gateway, one zygote, and the workers that the zygote forks.

Every child has one task here that starts it, waits for its end, decides what follows (`staffetta.restart`) and starts
it again. A worker keeps its name over restarts. The supervisor never serves a request, and it never blocks: everything
happens on one event loop.

Ends: `drain` lets running requests finish; `kill` ends everything at once. Should this process be killed instead, the
kernel kills gateway and zygote, and then the workers (`cli.lineage`).
"""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from cli.logs import LogRelay
from cli.messages import Fork
from cli.plan import ServePlan, WorkerPlan
from cli.zygote_link import ForkRefusedError, ZygoteLink, ZygoteLostError
from staffetta.config.environment import child_environment
from staffetta.config.resolved import encode
from staffetta.exits import REPEATING, ExitCode, OperatorError
from staffetta.restart import Backoff, describe_status, final_code

_QUIET: Final = {"GRPC_VERBOSITY": "ERROR"}
"""gRPC's core tells of every connection that ends; who needs to know is told by our own code."""

_LAST_WORDS_S: Final = 2.0
"""What a process gets to end by itself once no request runs."""


@dataclass(frozen=True, slots=True)
class Entries:
    """Where each role's code is, module:function. Replaced in tests of this file's own promises."""

    gateway: str = "gateway.main:main"
    prefill: str = "prefill_svc.main:main"
    decode: str = "decode_svc.main:main"

    def of(self, role: str) -> str:
        """The entry of a worker's role."""
        return self.prefill if role == "prefill" else self.decode


class ChildRefusedError(Exception):
    """A child ended over a mistake of the operator's, which it has told itself: there is no more to say."""

    def __init__(self, code: ExitCode) -> None:
        super().__init__(code)
        self.code = code


class ChildEndedError(OperatorError):
    """A child ended again and again, for no reason that its exit code names."""

    def __init__(self, name: str, status: int, last_lines: list[str]) -> None:
        said = next((line for line in reversed(last_lines) if line.strip()), "it wrote nothing")
        super().__init__(
            "CHILD_ENDED",
            f"{name} ended by {describe_status(status)}, and would again",
            why=f"its last line: {said.strip()}",
            fix="staffetta serve --log-level debug",
        )


@dataclass(slots=True)
class _Child:
    """One named child over all its lives."""

    name: str
    pid: int | None = None
    num_starts: int = 0
    started_at: float = 0.0
    backoff: Backoff = field(default_factory=Backoff)

    def started(self, pid: int) -> None:
        self.pid = pid
        self.num_starts += 1
        self.started_at = time.monotonic()


class Supervisor:
    """The children of one `serve`. Event loop only."""

    def __init__(self, plan: ServePlan, *, entries: Entries, say: Callable[[str], None]) -> None:
        """`say` tells the operator of ends and restarts."""
        self._plan = plan
        self._entries = entries
        self._say = say
        self._relay = LogRelay()
        self._gateway = _Child("gateway")
        self._zygote = _Child("zygote")
        self._workers = {worker.name: _Child(worker.name) for worker in plan.workers}
        self._gateway_process: asyncio.subprocess.Process | None = None
        self._link: ZygoteLink | None = None
        self._link_ready = asyncio.Event()  # set while `_link` takes commands
        self._stopping = asyncio.Event()
        self._is_ready = False
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.failure: asyncio.Future[OperatorError | ChildRefusedError] = asyncio.get_running_loop().create_future()
        """Resolves when serving cannot go on."""

    def start(self) -> None:
        """Starts everything; returns at once. The zygote is first, because its imports take longest."""
        self._tasks["zygote"] = asyncio.create_task(self._keep_zygote(), name="zygote")
        self._tasks["gateway"] = asyncio.create_task(self._keep_gateway(), name="gateway")
        for worker in self._plan.workers:
            self._tasks[worker.name] = asyncio.create_task(self._keep_worker(worker), name=worker.name)
        for task in self._tasks.values():
            task.add_done_callback(self._on_task_done)

    def pid_of(self, name: str) -> int | None:
        """The process that has a child's name now."""
        return {**self._workers, "gateway": self._gateway, "zygote": self._zygote}[name].pid

    def mark_ready(self) -> None:
        """From now on a child that ends is started again however often that was."""
        self._is_ready = True

    async def drain(self, timeout_s: float) -> None:
        """Ends admission, then running requests (up to `timeout_s`), then workers. Returns when all are gone."""
        self._stopping.set()
        if self._gateway_process is not None and self._gateway_process.returncode is None:
            self._gateway_process.terminate()
            await asyncio.wait([self._tasks["gateway"]], timeout=timeout_s + _LAST_WORDS_S)
        if self._link is not None:
            for child in self._workers.values():
                if child.pid is not None:
                    self._link.signal(child.pid, signal.SIGTERM)
        workers = [self._tasks[name] for name in self._workers]
        await asyncio.wait(workers, timeout=_LAST_WORDS_S)
        await self.kill()

    async def kill(self) -> None:
        """Ends everything at once. Returns when all are gone."""
        self._stopping.set()
        if self._gateway_process is not None and self._gateway_process.returncode is None:
            self._gateway_process.kill()
        if self._link is not None:
            self._link.kill()
        for task in self._tasks.values():
            task.remove_done_callback(self._on_task_done)
        await asyncio.wait(self._tasks.values(), timeout=_LAST_WORDS_S)
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _keep_gateway(self) -> None:
        config = encode(self._plan.gateway).encode()
        while not self._stopping.is_set():
            with self._relay.pipe("gateway") as log:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    *("-m", "cli.entry", "--parent", str(os.getpid()), self._entries.gateway, "gateway"),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # the terminal's Ctrl-C is for the supervisor alone
                    env=child_environment(**_QUIET),
                )
            self._gateway_process = process
            self._gateway.started(process.pid)
            with contextlib.suppress(ConnectionError):  # it ended before it read; its status says more
                await process.communicate(config)
            await self._after_end(self._gateway, await process.wait())

    async def _keep_zygote(self) -> None:
        entries = sorted({self._entries.of(worker.role) for worker in self._plan.workers})
        variables = {
            **_QUIET,
            "OMP_NUM_THREADS": str(self._plan.max_threads),
            # Waiting threads must not spin: two workers share the cores.
            "OMP_WAIT_POLICY": "passive",
            # NumPy's own pool would start threads at import, and nothing here multiplies matrices with NumPy.
            "OPENBLAS_NUM_THREADS": "1",
        }
        while not self._stopping.is_set():
            self._link = await ZygoteLink.start(entries, variables=variables, relay=self._relay)
            self._zygote.started(self._link.pid)
            with contextlib.suppress(ZygoteLostError):  # `wait` has its status
                await self._link.wait_until_imported()
                self._link_ready.set()
            status = await self._link.wait()
            self._link_ready.clear()
            await self._after_end(self._zygote, status)

    async def _keep_worker(self, worker: WorkerPlan) -> None:
        child = self._workers[worker.name]
        command = Fork(worker.name, worker.role, self._entries.of(worker.role), encode(worker.config))
        while (link := await self._wait_for_zygote()) is not None:
            try:
                with self._relay.pipe(worker.name) as log:
                    child.started(pid := await link.fork(command, log=log))
                status = await link.wait_for_end(pid)
            except ZygoteLostError:
                child.pid = None
                if link is self._link:
                    self._link_ready.clear()
            except ForkRefusedError as error:
                self._fail(
                    OperatorError("FORK_REFUSED", f"{worker.name} did not start", why=str(error), fix="report it")
                )
                await self._stopping.wait()
            else:
                await self._after_end(child, status)

    async def _wait_for_zygote(self) -> ZygoteLink | None:
        """The zygote once it takes commands; None when everything is to end."""
        waits = [asyncio.create_task(self._link_ready.wait()), asyncio.create_task(self._stopping.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return None if self._stopping.is_set() else self._link

    async def _after_end(self, child: _Child, status: int) -> None:
        """Returns when the child may start again, or at once when everything ends."""
        pid, child.pid = child.pid, None
        await self._relay.drain(child.name)
        if self._stopping.is_set():
            return
        lived_s = time.monotonic() - child.started_at
        num_early_ends = 0 if self._is_ready else child.num_starts
        if (code := final_code(status, num_early_ends=num_early_ends)) is not None:
            lines = self._relay.last_lines(child.name)
            self._fail(ChildRefusedError(code) if code in REPEATING else ChildEndedError(child.name, status, lines))
            await self._stopping.wait()
            return
        delay_s = child.backoff.next_delay(lived_s)
        when = f"in {delay_s:.1f} s" if delay_s else "now"
        self._say(f"{child.name} (pid {pid}) ended by {describe_status(status)}; it starts again {when}")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), delay_s)

    def _fail(self, error: OperatorError | ChildRefusedError) -> None:
        if not self.failure.done():
            self.failure.set_result(error)

    def _on_task_done(self, task: "asyncio.Task[None]") -> None:
        """A keeper that raised is a defect here; without this it would go unnoticed and its child unkept."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(
                OperatorError("SUPERVISOR", f"{task.get_name()} is kept no more", why=repr(error), fix="report it")
            )
