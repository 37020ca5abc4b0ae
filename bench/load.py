"""Sends one phase's requests to one server and times the answers. Nothing is parsed while anything is timed."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass

from bench.record import Record
from bench.target import Answer, Target
from bench.workload import Phase, PlannedRequest


@dataclass(frozen=True, slots=True)
class PhaseRun:
    """What came of a phase: every request's record, and the processor time that sending and receiving took, in
    seconds."""

    records: tuple[Record, ...]
    client_cpu_s: float


async def run_phase(target: Target, phase: Phase) -> PhaseRun:
    """Runs a phase to the end of its last answer. One request that fails fails the phase: raises TargetError."""
    started, cpu = time.perf_counter(), time.process_time()
    tasks: list[asyncio.Task[list[Answer]]] = []
    try:
        async with asyncio.TaskGroup() as group:
            if phase.concurrency is None:
                tasks += [group.create_task(_open(target, phase, request, started)) for request in phase.requests]
            else:
                left = iter(phase.requests)
                tasks += [group.create_task(_closed(target, phase, left)) for _ in range(phase.concurrency)]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from failed  # it cancelled the others; one cause is enough
    client_cpu_s = time.process_time() - cpu
    return PhaseRun(tuple(answer.record() for task in tasks for answer in task.result()), client_cpu_s)


async def _closed(target: Target, phase: Phase, left: Iterator[PlannedRequest]) -> list[Answer]:
    """One of several that take the next request as soon as their last one is answered."""
    return [await target.complete(request.prompt, phase.output_tokens, due_s=time.perf_counter()) for request in left]


async def _open(target: Target, phase: Phase, request: PlannedRequest, started: float) -> list[Answer]:
    """One request that is sent when it is due, whatever became of the others."""
    due_s = started + request.due_s
    await asyncio.sleep(due_s - time.perf_counter())
    return [await target.complete(request.prompt, phase.output_tokens, due_s=due_s)]
