"""`dsjax serve`: a model behind an OpenAI-compatible server."""

from typing import Any

import click

from dsjax import __version__
from dsjax.cli.find import find_model
from dsjax.cli.output import note
from dsjax.cli.verb import NATURAL, Number, Verb, fields_of
from dsjax.config import DTYPES, ConfigError, EngineConfig, MeshConfig, ServerConfig, nearest, show

PORT = Number(int, "a port from 0 to 65535 (0 = any free one)", lambda n: 0 <= n < 65536)
_KEY = "DSJAX_API_KEY"


@click.command(
    cls=Verb,
    short_help="Serve a model over HTTP, as OpenAI's API.",
    epilog="""\b
Examples:
  dsjax serve runs/tiny
  dsjax serve deepseek-ai/DeepSeek-V2-Lite-Chat --mesh expert=8 --max-rows 64
  curl localhost:8000/v1/completions -d '{"prompt": "def "}' -H 'Content-Type: application/json'""",
)
@click.argument("source", metavar="MODEL")
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Where to listen.")
@click.option("--port", type=PORT, default=8000, show_default=True, help="Port.")
@click.option("--api-key", metavar="KEY", envvar=_KEY, help=f"Bearer key that clients must send.  [{_KEY}]")
@click.option("--name", metavar="NAME", help="What clients call the model.  [default: the folder's name]")
@click.option("--dtype", type=click.Choice(DTYPES), help="Of the weights.  [default: the run's; bfloat16 from the Hub]")
@click.option("--mesh", metavar="AXIS=N,...", help="Devices: data, expert, tensor.  [default: one device]")
@fields_of(EngineConfig)
@fields_of(ServerConfig, "api_key")
@click.option("--checkpoint", type=NATURAL, metavar="STEP", help="Step of the checkpoint.  [default: the newest]")
def serve(source: str, host: str, port: int, api_key: str | None, name: str | None, **options: Any):
    """Serve MODEL, a run folder, a Hub checkpoint's folder or a Hub name, until Ctrl-C or SIGTERM.

    Compiles its programs first, and says when it is ready. SIGTERM lets the requests that run end.
    """
    sizes = mesh_sizes(options["mesh"])
    options["api_key"] = api_key
    engine, server = (
        kind(**{name: options[name] for name in kind.__dataclass_fields__}) for kind in (EngineConfig, ServerConfig)
    )
    folder = find_model(source)
    try:
        from dsjax.infer.server.run import run
    except ModuleNotFoundError as error:
        raise ConfigError(f"dsjax serve needs {error.name}: pip install 'dsjax[serve]'") from None

    run(
        folder,
        name=name or folder.resolve().name,
        host=host,
        port=port,
        engine=engine,
        server=server,
        sizes=sizes,
        dtype=options["dtype"],
        step=options["checkpoint"],
        say=note,
        version=__version__,
    )


def mesh_sizes(text: str | None) -> dict[str, int]:
    """AXIS=N,... as numbers. Raises ConfigError."""
    sizes: dict[str, int] = {}
    known = [axis for axis in MeshConfig.__dataclass_fields__ if axis not in ("context", "stage")]
    for part in filter(None, (text or "").split(",")):
        axis, _, n = part.partition("=")
        if axis not in known:
            raise ConfigError(f"--mesh={show(text)}: no axis {show(axis)}; the nearest is {nearest(axis, known)[0]}")
        if not n.isdigit() or not int(n):
            raise ConfigError(f"--mesh={show(text)}: expected {axis}=N with a whole number greater than 0")
        sizes[axis] = int(n)
    return sizes
