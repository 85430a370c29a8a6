"""The engine on a thread of its own, and requests to it from an event loop."""

import asyncio
import contextlib
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator

import jax

from dsjax.config import ConfigError
from dsjax.infer.engine import Engine
from dsjax.infer.requests import Request, Sampled


class Full(Exception):
    """As many requests wait as may."""


class Closing(Exception):
    """The server takes no more requests."""


class Driver:
    """Runs an engine's steps while there is something to do. `generate` may be called from one event loop.

    A step that fails ends the requests that it was for, and the next ones start on an empty cache.
    """

    def __init__(self, engine: Engine, max_waiting: int, stuck_s: float = 60.0):
        self.engine, self.max_waiting, self.stuck_s = engine, max_waiting, stuck_s
        self.n_open = 0  # requests that there is room for, and that have not ended
        self.failures = 0
        self.last_step = time.monotonic()
        self._wake, self._stop, self._closing = threading.Event(), False, False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Requests are taken, and steps go forward while there is one."""
        stuck = self.engine.busy and time.monotonic() - self.last_step > self.stuck_s
        return self._thread.is_alive() and not self._closing and not stuck

    def check(self, n: int = 1) -> None:
        """Raises Full or Closing if n requests cannot be taken now, and ConfigError if they never can."""
        most = self.engine.options.max_rows + self.max_waiting
        if self._closing:
            raise Closing
        if n > most:
            raise ConfigError(f"{n} samples at once: expected at most {most} on this server")
        if self.n_open + n > most:
            raise Full

    @contextlib.contextmanager
    def room(self, n: int) -> Iterator[None]:
        """Room for n requests, all or none. Raises what `check` raises."""
        self.check(n)
        self.n_open += n
        try:
            yield
        finally:
            self.n_open -= n

    async def generate(self, request: Request) -> AsyncIterator[list[Sampled] | str]:
        """New tokens as they come, and at last why the text ended. A caller that goes away cancels the request.

        Call it where there is room. Raises ConfigError for a request that cannot be done.
        """
        loop, said = asyncio.get_running_loop(), asyncio.Queue()
        given = request.tell

        def tell(tokens: list[Sampled]) -> bool | None:
            stop = given(tokens)
            loop.call_soon_threadsafe(said.put_nowait, tokens)
            return stop

        request.tell = tell
        request.done = lambda reason: loop.call_soon_threadsafe(said.put_nowait, reason)
        self.engine.submit(request)
        self._wake.set()
        ended = False
        try:
            while not ended:
                item = await said.get()
                ended = isinstance(item, str)
                yield item
        finally:
            if not ended:
                self.engine.cancel(request.id)
                self._wake.set()

    async def drain(self, seconds: float, hurry: Callable[[], bool] = lambda: False) -> None:
        """Takes no more requests, and returns when those that are there have ended, or the time is over."""
        self._closing = True
        end = time.monotonic() + seconds
        while (self.n_open or self.engine.busy) and time.monotonic() < end and not hurry():
            await asyncio.sleep(0.05)

    def close(self) -> None:
        """Ends the thread after its step; what still runs is cancelled."""
        self._closing = self._stop = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(self.stuck_s)

    def _loop(self) -> None:
        with jax.set_mesh(self.engine.mesh):
            while not self._stop:
                if not self.engine.busy:
                    self._wake.wait(1.0)
                    self._wake.clear()
                    self.last_step = time.monotonic()
                    if not self.engine.busy:
                        continue
                try:
                    self.engine.step()
                except Exception as error:
                    traceback.print_exc()
                    self.failures += 1
                    self.engine.reset(f"error: {type(error).__name__}")
                self.last_step = time.monotonic()
            self.engine.reset("cancelled")
