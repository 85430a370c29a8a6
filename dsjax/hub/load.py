"""A model ready for use, from a Hub folder or from a run folder: `load`, and `logits` of it.

model = dsjax.load("DeepSeek-V2-Lite", dtype="float32")
dsjax.logits(model, tokens)   # [B, T] int -> [B, T, V] float32
"""

import functools
import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from dsjax import config as configuration
from dsjax.config import DTYPES, PLAIN, ComputeConfig, Config, ConfigError, replace, show
from dsjax.data.tokenizer import Tokenizer, check_vocabulary
from dsjax.hub import fp8
from dsjax.hub.checkpoint import HubCheckpoint
from dsjax.hub.config import is_hub_folder
from dsjax.hub.names import HubTensor
from dsjax.model.transformer import DeepSeek, init_router_bias
from dsjax.precision import cast_weights, is_quantised, matrix_axes, quantise_weights, weight_name
from dsjax.state import Batch, RouterBias
from dsjax.train.checkpoint import Checkpoints, abstract, abstract_state
from sharding.mesh import make_mesh
from sharding.rules import spec

READERS = 4  # leaves read at a time
_FP8, _FP8_UE8M0 = "fp8_deepseek", "fp8_deepseek_ue8m0"  # what "fp8" is computed in


@dataclass(frozen=True)
class Loaded:
    """A model with all it needs to run: weights, router bias, their mesh, the configuration, and its folder."""

    model: DeepSeek
    router_bias: RouterBias
    mesh: Any
    config: Config
    folder: Path

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises ConfigError where the folder has no tokenizer.json."""
        if not (self.folder / "tokenizer.json").is_file():
            raise ConfigError(
                f"{self.folder}: tokenizer.json is missing; `dsjax train {self.folder}` makes a run's again, and a Hub "
                "folder needs one (a tiktoken.model is not read)"
            )
        tokenizer = Tokenizer.load(self.folder)
        check_vocabulary(str(self.folder / "tokenizer.json"), self.config.model.vocab_size, tokenizer)
        return tokenizer


def load(
    source: Path | str,
    dtype: str | None = None,
    mesh=None,
    *,
    step: int | None = None,
    progress: bool = False,
    say=None,
) -> Loaded:
    """The model of a Hub folder or run folder.

    dtype: float32 or bfloat16 of matrices and activations, by default the run's, bfloat16 for a Hub folder; routers and
    norms are float32. Or fp8, to generate and not to train: matrices in blocks of 128 x 128, those of released FP8
    checkpoints as they are, and activations in bfloat16, quantised where they meet (reference section 5.2). mesh: of
    `sharding.mesh.make_mesh`, one device by default. step: the run's checkpoint, the newest by default. say: called
    with notes on the folder. Each process reads only the slices that its devices hold.

    Raises ConfigError (HubError) for a folder that is neither, or damaged.
    """
    if dtype not in (None, *DTYPES):
        raise ConfigError(f"dtype={show(dtype)}: expected {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    folder, mesh = Path(source), make_mesh(jax.local_devices()[:1]) if mesh is None else mesh
    if not folder.is_dir():
        raise ConfigError(f"{show(str(source))}: no such folder; expected a Hub folder or a run folder")
    if is_hub_folder(folder):
        return _load_hub(folder, dtype or "bfloat16", mesh, progress, say)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{show(str(source))}: no config.json; expected a Hub folder or a run folder")
    config = configuration.load(folder / "config.json")
    plain = "bf16" if dtype == "fp8" else PLAIN.get(dtype, config.compute.precision)
    config = replace(config, compute=replace(config.compute, precision=plain))
    like = abstract_state(config, mesh).replace(ema=None, model=_like(config, mesh))
    with Checkpoints(folder, read_only=True) as checkpoints:
        state = checkpoints.restore_model(step, like)
    model = state.model
    if dtype == "fp8":
        config = replace(config, compute=replace(config.compute, precision=_FP8))
        with jax.set_mesh(mesh):
            model = jax.jit(quantise_weights, static_argnums=1)(model, config.compute.precision)
    return Loaded(model, state.router_bias, mesh, config, folder)


def logits(model: Loaded, tokens) -> np.ndarray:
    """Scores of the next token at every position, [B, T, V] float32, of rows of token ids [B, T] without padding.

    Raises ConfigError for ids that are no tokens of the model, or a shape that is not [B, T].
    """
    tokens = np.asarray(tokens)
    cfg = model.config.model
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or not tokens.size:
        raise ConfigError(f"tokens: {tokens.dtype}{list(tokens.shape)}; expected whole numbers [B, T]")
    if tokens.min() < 0 or tokens.max() >= cfg.vocab_size:
        raise ConfigError(f"tokens: {tokens.min()} to {tokens.max()}; expected 0 to {cfg.vocab_size - 1}")
    if tokens.shape[1] > cfg.max_position_embeddings:
        raise ConfigError(f"tokens: {tokens.shape[1]} a row; expected at most {cfg.max_position_embeddings}")
    b, t = tokens.shape
    whole = [-(-n // k) * k for n, k in zip((b, t), _shards(model.mesh))]  # what the mesh divides; the rest is padding
    rows, valid = np.zeros(whole, np.int32), np.zeros(whole, np.int32)
    rows[:b, :t], valid[:b, :t] = tokens, 1
    positions = np.broadcast_to(np.arange(whole[1], dtype=np.int32), whole)
    with jax.set_mesh(model.mesh):
        batch = Batch(*(jax.device_put(a, spec("batch", "seq")) for a in (rows, valid, positions)))
        return np.asarray(_logits(model.model, batch, model.router_bias, model.config.compute))[:b, :t]


@functools.partial(jax.jit, static_argnums=3)
def _logits(model: DeepSeek, batch: Batch, router_bias: RouterBias, compute: ComputeConfig):
    return model.logits(model(batch, router_bias, compute).hidden)


def _shards(mesh) -> list[int]:
    """Parts that the mesh cuts rows and their tokens into."""
    return [
        math.prod(mesh.shape[axis] for axis in ([axes] if isinstance(axes, str) else axes))
        for axes in spec("batch", "seq")
    ]


def _like(config: Config, mesh, quantised: bool = False) -> DeepSeek:
    """Shapes, dtypes and shardings of the weights in the compute format, or kept in FP8."""
    precision = config.compute.precision

    def make():
        model = cast_weights(DeepSeek(config.model, rngs=nnx.Rngs(0)), precision)
        return quantise_weights(model, precision) if quantised else model

    return abstract(make, mesh)


def _load_hub(folder: Path, dtype: str, mesh, progress: bool, say) -> Loaded:
    hub = HubCheckpoint(folder)
    notes = list(hub.notes)
    if differing := hub.differing_copies():
        names = ", ".join(t.name for t in differing)
        notes.append(f"{names}: not equal to the shared weights, which multi-token prediction here reads instead")
    for note in notes if say else ():
        say(note)
    config = Config(
        name=folder.resolve().name,
        seq_len=min(4096, hub.model.max_position_embeddings),
        model=hub.model,
        compute=ComputeConfig(precision=PLAIN.get(dtype) or (_FP8_UE8M0 if hub.config.ue8m0 else _FP8)),
    )
    like = {
        "model": _like(config, mesh, dtype == "fp8"),
        "router_bias": abstract(lambda: init_router_bias(hub.model), mesh),
    }
    places: dict[str, dict[tuple[int, ...], HubTensor]] = {}
    for t in hub.tensors:
        if not t.copy:
            places.setdefault(t.leaf, {})[t.index] = t
    paths, tree = jax.tree_util.tree_flatten_with_path(like, is_leaf=is_quantised)
    total = sum(hub.files[t.name].n_bytes for of_leaf in places.values() for t in of_leaf.values())
    with (
        tqdm(total=total, desc="reading", unit="B", unit_scale=True, disable=not progress or None, leave=False) as bar,
        ThreadPoolExecutor(READERS) as pool,
    ):
        read = functools.partial(_read_leaf, hub, bar)
        arrays = list(pool.map(read, (places.get(weight_name(path)) for path, _ in paths), (a for _, a in paths)))
    state = jax.tree.unflatten(tree, arrays)
    return Loaded(state["model"], state["router_bias"], mesh, config, folder)


def _read_leaf(hub: HubCheckpoint, bar, tensors: dict[tuple[int, ...], HubTensor] | None, like):
    """One leaf on its devices. Without tensors (no router bias, no MTP): zeros."""
    values = like.values if is_quantised(like) else like
    if tensors is None or not values.size:
        return jax.tree.map(lambda a: jax.device_put(jnp.zeros(a.shape, a.dtype), a.sharding), like)
    n_stacked = len(next(iter(tensors)))
    done: dict[Any, list[np.ndarray]] = {}  # devices that hold the same slice share one reading

    def part(index: tuple[slice, ...]) -> list[np.ndarray]:
        """A device's part of the leaf's one array, or of values and scales."""
        whole = tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, values.shape))
        key = tuple((s.start, s.stop) for s in whole)
        if key not in done:
            stacked, place = whole[:n_stacked], whole[n_stacked:]
            done[key] = [np.empty(a.sharding.shard_shape(a.shape), a.dtype) for a in jax.tree.leaves(like)]
            for at in itertools.product(*(range(s.start, s.stop) for s in stacked)):
                read = _in_blocks(hub, tensors[at], place) if is_quantised(like) else (hub.read(tensors[at], place),)
                bar.update(read[0].size * hub.files[tensors[at].name].itemsize)
                for out, a in zip(done[key], read):
                    out[tuple(i - s.start for i, s in zip(at, stacked))] = a
        return done[key]

    if not is_quantised(like):
        return jax.make_array_from_callback(like.shape, like.sharding, lambda index: part(index)[0])
    places = values.sharding.addressable_devices_indices_map(values.shape)
    parts = [[jax.device_put(a, device) for a in part(index)] for device, index in places.items()]
    make = jax.make_array_from_single_device_arrays
    return jax.tree.map(
        lambda a, *parts: make(a.shape, a.sharding, parts), like, *map(jax.tree.structure(like).unflatten, parts)
    )


def _in_blocks(hub: HubCheckpoint, tensor: HubTensor, place: tuple[slice, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Values and scales of a weight: those of the file, if it has them and the part begins where a block does."""
    if (kept := hub.read_blocks(tensor, place)) is not None:
        return kept
    part = hub.read(tensor, place)
    stacked, split = matrix_axes(tensor.leaf)
    matrix = part.astype(np.float32).reshape(math.prod(part.shape[: split - stacked]), -1)
    values, scales = fp8.quantise(matrix, hub.config.ue8m0)
    return values.reshape(part.shape), scales
