"""The one thread that touches an engine, and the way in for all others.

Commands are carried out between steps, in the order in which they were submitted; the kernels may have gone on by then
to the next token of every stream. With nothing to do the thread sleeps on a condition; commands, `wake` and `turn`
end the sleep. It must never spin, and never end without saying why.
"""

import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from engine.engine import Engine
from engine.request import StepOutput
from staffetta.errors import StaffettaError, UnavailableError

log = logging.getLogger(__name__)

T = TypeVar("T")


class _Command:
    """One piece of work for the engine thread, and how it is told that there is no engine any more."""

    def __init__(self, run: Callable[[Engine], None], drop: Callable[[], None]) -> None:
        self.run = run
        self.drop = drop


class EngineThread:
    """Owns the engine from `start` to the end of the thread. Every method may be called from any thread.

    `on_output` is called on the engine thread with every output that has news; `on_failure` likewise, as the last
    thing, when the loop itself ends by an exception. A step that fails is no such thing: it ends one request.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        on_output: Callable[[StepOutput], None],
        on_failure: Callable[[BaseException], None] | None = None,
        name: str = "engine",
        cpus: frozenset[int] = frozenset(),
    ) -> None:
        """The thread, and those that it starts to compute, keep to `cpus`, or where that is empty to the process's."""
        self._engine = engine
        """Engine thread only, once started, but for `hold`."""
        self._on_output = on_output
        self._on_failure = on_failure
        self._cpus = cpus
        self._condition = threading.Condition()
        # Guarded by the condition:
        self._commands: deque[_Command] = deque()
        self._is_woken = False
        self._is_stopping = False
        self._failure: BaseException | None = None
        self._num_turns = 0
        """Written by the engine thread alone."""
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)

    @property
    def is_alive(self) -> bool:
        """Whether the loop runs."""
        return self._thread.is_alive()

    @property
    def num_turns(self) -> int:
        """Turns of the loop so far; any thread may read it. `turn` makes one, so a number that stays shows a wedged
        engine."""
        return self._num_turns

    @property
    def failure(self) -> BaseException | None:
        """What ended the loop, when it was not `stop`."""
        with self._condition:
            return self._failure

    def start(self) -> None:
        """Starts the thread; once."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the loop after the step in progress and waits for it. Idempotent; not from the engine thread."""
        with self._condition:
            self._is_stopping = True
            self._condition.notify()
        if self._thread.ident is not None:
            self._thread.join()
        self._drop_commands()

    def submit(self, command: Callable[[Engine], None]) -> None:
        """Has `command` carried out between two steps. Dropped when the loop is over: there is no engine to command.

        A StaffettaError that it raises is logged; anything else is a defect and ends the loop.
        """
        self._enqueue(_Command(lambda engine: _run_logged(command, engine), lambda: None))

    def call(self, function: Callable[[Engine], T]) -> "Future[T]":
        """Has `function` carried out before the next step; its result or exception is in the future. A step that has
        been planned ahead, and is not begun, makes way for it.

        The future fails with UnavailableError when the loop is over, or ends before it came to this.
        """
        future = self.ask(function)
        self._engine.hold()
        return future

    def ask(self, function: Callable[[Engine], T]) -> "Future[T]":
        """Has `function`, which changes nothing of what is to be computed, carried out between two steps.

        Its result comes as that of `call` does. No step that is begun ahead makes way for it.
        """
        future: Future[T] = Future()

        def run(engine: Engine) -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = function(engine)
            except Exception as error:  # noqa: BLE001 (the caller gets it through the future)
                future.set_exception(error)
            except BaseException as error:
                future.set_exception(error)
                raise
            else:
                future.set_result(result)

        def drop() -> None:
            if future.set_running_or_notify_cancel():
                future.set_exception(UnavailableError("the engine of this worker has stopped: retry on another worker"))

        self._enqueue(_Command(run, drop))
        return future

    def wake(self) -> None:
        """Has the engine look at its KV source, which has news, before the next step that has not been begun."""
        self.turn()
        self._engine.hold()

    def turn(self) -> None:
        """Makes the loop turn once more if it sleeps: somebody wants a sign of life."""
        with self._condition:
            self._is_woken = True
            self._condition.notify()

    def _enqueue(self, command: _Command) -> None:
        with self._condition:
            is_open = not self._is_stopping and self._failure is None
            if is_open:
                self._commands.append(command)
                self._condition.notify()
        if not is_open:
            command.drop()

    def _main(self) -> None:
        try:
            if self._cpus:
                os.sched_setaffinity(0, self._cpus)  # this thread's
            try:
                self._loop()
            finally:
                self._engine.close()
        except BaseException as error:
            log.critical("the engine thread failed", exc_info=error)
            with self._condition:
                self._failure = error
            self._drop_commands()
            if self._on_failure is not None:
                self._on_failure(error)

    def _loop(self) -> None:
        while True:
            self._num_turns += 1
            self._engine.go_on()  # whatever asked to hold has been put down by now
            with self._condition:
                commands = list(self._commands)
                self._commands.clear()
                self._is_woken = False
                if self._is_stopping:
                    self._commands.extend(commands)
                    return
            for command in commands:
                command.run(self._engine)
            output = self._engine.step()
            if output is None:
                self._sleep()
            elif output.outputs:
                self._on_output(output)

    def _sleep(self) -> None:
        with self._condition:
            # News that came since the step began is not lost: its mark is still set, because only the loop clears it.
            self._condition.wait_for(lambda: self._commands or self._is_woken or self._is_stopping)

    def _drop_commands(self) -> None:
        with self._condition:
            commands = list(self._commands)
            self._commands.clear()
        for command in commands:
            command.drop()


def _run_logged(command: Callable[[Engine], None], engine: Engine) -> None:
    try:
        command(engine)
    except StaffettaError as error:
        log.warning("a command was refused: %s", error.message)
