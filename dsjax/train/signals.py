"""SIGTERM and Ctrl-C: noted while a step runs, at once before the first."""

import signal
import threading
from typing import Any

NAMES = ("SIGTERM", "Ctrl-C")


class Stopped(KeyboardInterrupt):
    """A signal that came before the first step."""


class Signals:
    """SIGTERM and Ctrl-C. They end a run at once, but while it is `patient` they are noted by name.

    A second Ctrl-C does not wait. Only the main thread of a program can hear signals; elsewhere this does nothing.
    """

    def __init__(self):
        self.name: str | None = None
        self.patient = False
        self._old: dict[int, Any] = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._old.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def _note(self, number: int, _) -> None:
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        if not self.patient:
            raise Stopped(name)
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = self.name or name
