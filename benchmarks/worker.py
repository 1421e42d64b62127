"""Work in a process of its own, so that a kernel that hangs or faults takes nothing else with it."""

import multiprocessing
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection

STARTING = 180.0  # seconds that a process may take to import what it needs


class WorkerLost(Exception):
    """The process hung, died or gave up; `at` is where it said that it was, None before it said anything."""

    def __init__(self, why: str, at=None):
        super().__init__(why)
        self.at = at


class Worker:
    """One process that answers one message after the other. It is started when it is first asked, and started anew
    after it was lost.

    target: a function of a module; it is called there with a Connection and `arguments`, and ends in `serve`.
    """

    def __init__(self, target: Callable, *arguments):
        self.target, self.arguments = target, arguments
        self.process = self.connection = None

    def ask(self, message, patience: float):
        """The answer. Raises WorkerLost where the process dies, gives up, or says nothing for `patience` seconds."""
        at = None
        try:
            if self.process is None:
                self._start()
            self.connection.send(message)
            while True:
                kind, value = self._next(patience)
                if kind == "done":
                    return value
                if kind == "lost":
                    raise WorkerLost(value)
                at = value
        except WorkerLost as lost:
            self.close()
            raise WorkerLost(str(lost), at) from None
        except OSError as error:  # it died between two messages
            self.close()
            raise WorkerLost(f"it died: {error}", at) from None

    def close(self) -> None:
        """End the process, whatever it does."""
        if self.process is not None:
            self.process.kill()
            self.process.join(10)
            self.connection.close()
        self.process = self.connection = None

    def _start(self):
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.connection, other = context.Pipe()
        self.process = context.Process(target=self.target, args=(other, *self.arguments), daemon=True)
        self.process.start()
        other.close()
        kind, value = self._next(STARTING)
        if kind == "lost":
            raise WorkerLost(value)

    def _next(self, patience):
        if not self.connection.poll(patience):
            raise WorkerLost(f"it did nothing for {patience:.0f} s and was killed")
        try:
            return self.connection.recv()
        except EOFError:
            self.process.join(10)
            code = self.process.exitcode
            how = signal.Signals(-code).name if code is not None and code < 0 else f"exit status {code}"
            raise WorkerLost(f"it died: {how}") from None


def serve(connection: Connection, answer: Callable) -> None:
    """Sends answer(message, tell) for every message, until the connection is closed. answer calls tell(at) to report
    where it is, and that it is alive. An exception ends the process, since nobody knows then what still works."""

    def tell(at):
        connection.send(("at", at))

    connection.send(("ready", None))
    while True:
        try:
            message = connection.recv()
        except EOFError:
            return
        try:
            reply = "done", answer(message, tell)
        except Exception as error:
            traceback.print_exc()
            reply = "lost", described(error)
        connection.send(reply)
        if reply[0] == "lost":
            return


def described(error: Exception) -> str:
    """The error's type and the line of its message that says what is wrong: the first one, since CUDA's go on with
    advice; the last one of those from Triton's compiler, which begin with the source."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1 if lines[0].startswith('at ') else 0]}"
