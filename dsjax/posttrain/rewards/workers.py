"""Processes that answer questions within a time, and are killed when it is over; another one begins then."""

import multiprocessing
import queue
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection

from dsjax.config import ConfigError

_MEMORY_BYTES = 4 << 30  # of addresses that a worker may take
_START_S = 60.0  # for a worker to import what it needs


class Workers:
    """n processes that run `work`. To be used as a context; `ask` may be called from several threads.

    work: a function of a module, called in the process with a pipe: it imports what it needs, sends one message, and
    then answers each that comes. `killed` counts those that took too long or ended by themselves. Raises ConfigError,
    on entry or in `ask`, where one cannot begin.
    """

    def __init__(self, work: Callable[[Connection], None], n: int, seconds: float):
        self.seconds, self.killed = seconds, 0
        self._idle: queue.Queue[_Worker] = queue.Queue()
        self._all = [_Worker(work) for _ in range(n)]
        for worker in self._all:
            self._idle.put(worker)

    def __enter__(self):
        try:
            self._all[0].begin()
        except ConfigError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for worker in self._all:
            worker.kill()

    def ask(self, question: bytes) -> bytes | None:
        """The answer; None if there was none in time. Waits for a worker that is idle."""
        worker = self._idle.get()
        try:
            worker.begin()
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

    def begin(self) -> None:
        """Waits until it has imported what it needs. Raises ConfigError where it cannot."""
        if self._ready:
            return
        try:
            self._wait(_START_S)
        except (TimeoutError, EOFError, OSError) as error:
            self._process.join(1.0)
            code = self._process.exitcode
            why = f"no word for {_START_S:g} s" if isinstance(error, TimeoutError) else f"exit code {code}"
            raise ConfigError(
                f"rewards: a process that judges could not begin: {why}; its own error is above. A script has to keep "
                'what begins it behind `if __name__ == "__main__":`'
            ) from None
        self._ready = True

    def ask(self, question: bytes, seconds: float) -> bytes:
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
