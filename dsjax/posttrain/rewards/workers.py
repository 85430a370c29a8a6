"""Processes that answer questions within a time, and are killed when it is over; another one begins then."""

import multiprocessing
import queue
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection

_MEMORY_BYTES = 4 << 30  # of addresses that a worker may take
_START_S = 60.0  # for a worker to import what it needs


class Workers:
    """n processes that run `work`. To be used as a context; `ask` may be called from several threads.

    work: a function of a module, called in the process with a pipe: it imports what it needs, sends one message, and
    then answers each that comes. `killed` counts those that took too long or ended by themselves.
    """

    def __init__(self, work: Callable[[Connection], None], n: int, seconds: float):
        self.seconds, self.killed = seconds, 0
        self._idle: queue.Queue[_Worker] = queue.Queue()
        self._all = [_Worker(work) for _ in range(n)]
        for worker in self._all:
            self._idle.put(worker)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for worker in self._all:
            worker.kill()

    def ask(self, question: bytes) -> bytes | None:
        """The answer; None if there was none in time. Waits for a worker that is idle."""
        worker = self._idle.get()
        try:
            return worker.ask(question, self.seconds)
        except (TimeoutError, EOFError, OSError):
            self.killed += 1
            worker.restart()
            return None
        finally:
            self._idle.put(worker)


class _Worker:
    def __init__(self, work: Callable[[Connection], None]):
        self._work = work
        self.restart()

    def restart(self) -> None:
        if hasattr(self, "_process"):
            self.kill()
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_confined, args=(self._work, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._ready = False

    def ask(self, question: bytes, seconds: float) -> bytes:
        if not self._ready:
            self._wait(_START_S)
            self._ready = True
        self._pipe.send_bytes(question)
        return self._wait(seconds)

    def _wait(self, seconds: float) -> bytes:
        if not self._pipe.poll(seconds):
            raise TimeoutError
        return self._pipe.recv_bytes()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _confined(work: Callable[[Connection], None], pipe: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    work(pipe)
