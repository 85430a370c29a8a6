"""A server from a folder: load, compile, listen."""

import math
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import uvicorn

from dsjax.config import ConfigError, EngineConfig, ServerConfig
from dsjax.hub.load import load
from dsjax.infer.engine import Engine
from dsjax.infer.server.app import create_app
from dsjax.infer.server.driver import Driver
from dsjax.infer.server.service import Service
from sharding.mesh import make_mesh, show_axes

_LAST_WORDS_S = 5  # for what is still to be sent when no request runs any more


def run(
    folder: Path,
    *,
    name: str,
    host: str,
    port: int,
    engine: EngineConfig,
    server: ServerConfig,
    sizes: dict[str, int],
    dtype: str | None,
    step: int | None,
    say: Callable[[str], None],
    version: str,
) -> None:
    """Serves until a signal. Raises ConfigError for what the user can mend."""
    n, progress = math.prod(sizes.values()), sys.stderr.isatty()
    if n > len(jax.local_devices()):
        raise ConfigError(f"--mesh={show_axes(sizes)}: needs {n} devices; there are {len(jax.local_devices())}")
    mesh = make_mesh(jax.local_devices()[:n], **sizes)
    loaded = load(folder, dtype, mesh, step=step, progress=progress, say=say)
    loaded.tokenizer  # noqa: B018  a folder without one is refused before anything is compiled
    with jax.set_mesh(mesh):
        it = Engine(loaded, engine)
        it.warm(progress=progress)
    service = Service(loaded, Driver(it, server.max_waiting), server, name)
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn drains, and raises them once more for whoever had them
        signal.signal(number, lambda *_: None)
    Server(service, host, port, say, version).run()


class Server(uvicorn.Server):
    """Listens until a signal, and on while requests end: /ready says so, and new ones are refused."""

    def __init__(
        self,
        service: Service,
        host: str = "127.0.0.1",
        port: int = 8000,
        say: Callable[[str], None] = lambda line: None,
        version: str = "",
    ):
        self.service, self.say = service, say
        config = uvicorn.Config(
            create_app(service, version),
            host=host,
            port=port,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_LAST_WORDS_S,
            lifespan="on",
        )
        super().__init__(config)

    @property
    def url(self) -> str:
        where = self.servers[0].sockets[0].getsockname()
        return f"http://{where[0]}:{where[1]}"

    async def startup(self, sockets=None):
        await super().startup(sockets)
        if self.started:
            self.say(f"{self.service.name} is served at {self.url}  (Ctrl-C ends it)")

    async def main_loop(self):
        await super().main_loop()
        await self.service.driver.drain(self.service.config.drain_s, hurry=lambda: self.force_exit)
