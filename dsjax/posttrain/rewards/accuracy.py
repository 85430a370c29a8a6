"""Reward for the right answer of a problem in mathematics.

The answer is cut out here; then it is compared as a text and as a number, and only then as an expression, by
math-verify in worker processes that are killed when their time is over: an expression may be made to take for ever.
"""

import multiprocessing
import queue
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection

from dsjax.posttrain.rewards.answer import last_answer, last_boxed, number, plain, without_thinking

_MEMORY_BYTES = 4 << 30  # of addresses that a worker may take
_START_S = 60  # for a worker to import what it needs


def accuracy_reward(text: str, expected: str, same: Callable[[str, str], bool]) -> float:
    r"""1 if the last \boxed{} behind the thinking, or else the last <answer>, is what was expected, else 0.

    same: whether two answers that differ as texts, and are not both numbers, are equal (`Judges.same`).
    """
    text = without_thinking(text)
    answer = last_boxed(text)
    if answer is None:
        answer = last_answer(text)
    if not answer:
        return 0.0
    one, other = plain(answer), plain(expected)
    if one == other:
        return 1.0
    values = number(one), number(other)
    if None not in values:
        return float(values[0] == values[1])
    return float(same(expected, answer))


class Judges:
    """math-verify in n processes. To be used as a context; `same` may be called from several threads.

    A comparison that takes longer than seconds, or more memory than a worker may have, counts as not equal; its worker
    is killed, and another one begins.
    """

    def __init__(self, n: int = 2, seconds: float = 5.0):
        self.seconds, self.killed = seconds, 0
        self._idle: queue.Queue[_Worker] = queue.Queue()
        self._all = [_Worker() for _ in range(n)]
        for worker in self._all:
            self._idle.put(worker)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for worker in self._all:
            worker.kill()

    def same(self, expected: str, answer: str) -> bool:
        """Whether two answers in LaTeX or plain notation are one. Waits for a worker that is idle."""
        worker = self._idle.get()
        try:
            return worker.ask((expected, answer), self.seconds)
        except (TimeoutError, EOFError, OSError):
            self.killed += 1
            worker.restart()
            return False
        finally:
            self._idle.put(worker)


class _Worker:
    def __init__(self):
        self.restart()

    def restart(self) -> None:
        if hasattr(self, "_process"):
            self.kill()
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._ready = False

    def ask(self, pair: tuple[str, str], seconds: float) -> bool:
        if not self._ready:
            self._wait(_START_S)
            self._ready = True
        self._pipe.send_bytes("\0".join(pair).encode("utf-8", "replace"))
        return self._wait(seconds) == b"1"

    def _wait(self, seconds: float) -> bytes:
        if not self._pipe.poll(seconds):
            raise TimeoutError
        return self._pipe.recv_bytes()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _work(pipe: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import logging

    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    pipe.send_bytes(b"ready")
    while True:
        try:
            expected, answer = pipe.recv_bytes().decode().split("\0")[:2]
        except EOFError:
            return
        sides = [parse(f"${side}$", parsing_timeout=None, raise_on_error=False) for side in (expected, answer)]
        equal = all(sides) and verify(*sides, timeout_seconds=None, raise_on_error=False)
        pipe.send_bytes(b"1" if equal else b"0")
