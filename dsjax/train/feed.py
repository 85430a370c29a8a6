"""Batches for the loop, read by a thread: one that does not come is told of, and in the end given up."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dsjax.config import ConfigError, FaultsConfig

AHEAD = 2  # batches that wait for the loop
_POLL_S = 0.2
_threads: list[threading.Thread] = []  # that have been told to end


class Stalled(ConfigError):
    """No batch for faults.stall_stop_s. The thread that waits for it may never end."""


class Feed:
    """An iterator over `batches` that never waits unseen: `reading` says what is being read, `tell` hears of a wait,
    which ends where `interrupted`."""

    def __init__(
        self,
        batches: Iterator[tuple[int, dict[str, np.ndarray]]],
        faults: FaultsConfig,
        tell: Callable[[str], None],
        reading: Callable[[], str],
        interrupted: Callable[[], bool] = lambda: False,
    ):
        self.faults, self.tell, self.reading, self.interrupted = faults, tell, reading, interrupted
        self._queue: queue.Queue[Any] = queue.Queue(AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=[batches], daemon=True)
        self._thread.start()

    def __next__(self) -> tuple[int, dict[str, np.ndarray]] | None:
        """(step, arrays); None if it was interrupted while it waited. Raises Stalled, and what the reading raises."""
        begin, told = time.monotonic(), False
        while True:
            try:
                item = self._queue.get(timeout=_POLL_S)
            except queue.Empty:
                if self.interrupted():
                    return None
                waited = time.monotonic() - begin
                if waited > self.faults.stall_stop_s:
                    self.close()
                    raise Stalled(
                        f"no batch for {waited:.0f} s (faults.stall_stop_s): {self.reading()} does not answer; the "
                        "same command goes on from the last checkpoint"
                    ) from None
                if waited > self.faults.stall_warn_s and not told:
                    told = True
                    self.tell(f"no batch for {waited:.0f} s: waiting for {self.reading()}")
                continue
            if told:
                self.tell(f"the data goes on, after {time.monotonic() - begin:.0f} s")
            if isinstance(item, BaseException):
                raise item
            return item

    def close(self) -> None:
        """No more is read ahead."""
        self._closed.set()
        _threads[:] = [t for t in _threads if t.is_alive()] + [self._thread]

    def _fill(self, batches: Iterator) -> None:
        try:
            for item in batches:
                if not self._put(item):
                    return
            self._put(StopIteration())
        except BaseException as error:  # the loop raises it
            self._put(error)

    def _put(self, item: Any) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=_POLL_S)
                return True
            except queue.Full:
                pass
        return False


def left_behind(wait_s: float = 1.0) -> bool:
    """Whether a feed's thread does not end: it waits for data that never come, and Python would wait for it."""
    for thread in _threads:
        thread.join(wait_s)
    return any(thread.is_alive() for thread in _threads)
