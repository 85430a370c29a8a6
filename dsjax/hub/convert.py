"""Hub checkpoints to run folders and back, a piece of a tensor at a time.

    import_checkpoint("DeepSeek-V2-Lite", "runs/lite")   # then: dsjax generate runs/lite, dsjax train runs/lite
    export_checkpoint("runs/lite", "out")                # then: vllm serve out

What a checkpoint here cannot say of the Hub's files lies in the run's `hub/`: where they were, config.json as it was,
each tensor's dtype, the FP8 scales, and tensors that have no place in our model; and the run's configuration, as made.
"""

import contextlib
import functools
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
from tqdm import tqdm

from dsjax import config as configuration
from dsjax.config import PLAIN, BalanceConfig, ComputeConfig, Config, ConfigError, DataConfig, ModelConfig, show
from dsjax.data.tokenizer import Tokenizer
from dsjax.files import write_json
from dsjax.hub import fp8
from dsjax.hub.checkpoint import HubCheckpoint, pieces
from dsjax.hub.config import HubConfig, from_hub, to_hub
from dsjax.hub.files import DTYPES, Planned, Stored, plan_shards, read_header, read_json, write_shards
from dsjax.hub.names import HubTensor, hub_tensors
from dsjax.train.checkpoint import Checkpoints, has_checkpoint
from dsjax.train.leaves import LeafFolder

TEXT_FILES = (  # lie in a run folder as in a Hub folder
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
WORKERS = 2  # pieces of a tensor in flight
Say = Callable[[str], None]


def import_checkpoint(
    source: Path | str, target: Path | str, *, dtype: str | None = None, say: Say = print, progress: bool = True
) -> None:
    """Makes the run folder `target` of a Hub folder's weights: step 0, to generate from and to train on.

    dtype: float32 of all weights, or bfloat16 of matrices but the router; by default as in the files, and bfloat16 from
    FP8. Memory: a few pieces of tensors. Raises ConfigError (HubError) before any work for a folder that is not whole;
    on any failure `target` is left as it was.
    """
    hub = HubCheckpoint(source)
    for note in hub.notes:
        say(note)
    leaves = _by_leaf(hub.tensors)
    kinds = {leaf: _kept_dtype(hub, leaf, group, dtype) for leaf, group in leaves.items()}
    total = sum(math.prod(t.shape) * kinds[t.leaf].itemsize for t in hub.tensors if not t.copy)
    with _beside(target, total) as folder:
        _run_files(hub, folder, dtype, say)
        out = LeafFolder(folder / "checkpoints" / "0")
        read = sum(hub.files[t.name].n_bytes for t in hub.tensors if not t.copy)
        with _bar(read, "importing", progress) as bar, ThreadPoolExecutor(WORKERS) as pool:
            for leaf, group in leaves.items():
                _import_leaf(hub, leaf, group, kinds[leaf], out, pool, bar)
            biases = _absent_biases(hub.model, leaves)
            for leaf, shape in biases.items():
                out.create(leaf, shape, np.dtype(np.float32), shape).write(np.zeros(shape, np.float32)).result()
        out.finish([*leaves, *biases])
        _keep_side(hub, folder / "hub", hub.differing_copies(), say)
        shutil.copyfile(folder / "config.json", folder / "hub" / "run.json")


def export_checkpoint(
    source: Path | str,
    target: Path | str,
    *,
    dtype: str | None = None,
    fp8_blocks: bool = False,
    step: int | None = None,
    say: Say = print,
    progress: bool = True,
) -> None:
    """Writes a run's weights as a Hub folder that transformers, vLLM and SGLang read.

    source: a run folder, or one of its checkpoints (run/checkpoints/100). dtype: float32 of all, or bfloat16 of
    matrices; by default as imported, and for a model trained here bfloat16 but for the router's bias. fp8_blocks:
    quantises what released FP8 checkpoints do; a block unchanged since its import gets its values and scale back bit
    for bit. Memory and errors as import.
    """
    run, step = _find_checkpoint(Path(source), step)
    config = configuration.load(run / "config.json")
    side, model = run / "hub", config.model
    raw = read_json(str(side / "config.json"), (side / "config.json").read_bytes()) if side.is_dir() else {}
    hub = from_hub(raw) if raw else HubConfig(model)
    given = json.loads((side / "tensors.json").read_text()) if side.is_dir() else {}
    scales = read_header(side / "scales.safetensors") if (side / "scales.safetensors").is_file() else {}
    extra = read_header(side / "extra.safetensors") if (side / "extra.safetensors").is_file() else {}
    tensors = hub_tensors(model)
    leaves = LeafFolder(run / "checkpoints" / str(step))
    lacking = sorted({t.leaf for t in tensors} - set(leaves.names()))
    if lacking:
        raise ConfigError(f"{leaves.folder.parent}: leaf {lacking[0]} is missing; this is not config.json's model")

    plan: list[tuple[HubTensor, Planned, Planned | None]] = []
    for t in tensors:
        kept = extra.get(t.name)
        out = kept.dtype if kept else _out_dtype(t, given.get(t.name), dtype, fp8_blocks)
        scale = None
        if out == "F8_E4M3":
            kind = scales[t.name + fp8.SUFFIX].dtype if t.name + fp8.SUFFIX in scales else "F32"
            scale = Planned(t.name + fp8.SUFFIX, kind, fp8.scale_shape(t.shape))
        plan.append((t, Planned(t.name, out, t.shape), scale))
    planned = [p for _, weights, scale in plan for p in (weights, scale) if p]
    total = sum(p.n_bytes for p in planned)
    values = to_hub(model, raw, fp8=fp8_blocks, ue8m0=hub.ue8m0, dtype=dtype)
    with _beside(target, total) as folder, _bar(total, "exporting", progress) as bar:
        exporter = _Exporter(leaves, scales, extra, hub.ue8m0, bar)
        rows = (piece for t, weights, scale in plan for piece in exporter.rows(t, weights, scale))
        write_shards(folder, plan_shards(planned), rows)
        tokens = _text_files(run, folder, made_here=not raw, say=say)
        (folder / "config.json").write_text(json.dumps(tokens | values, indent=2, ensure_ascii=False) + "\n")


class _Exporter:
    """A tensor's rows, piece by piece, then its scales."""

    def __init__(self, leaves: LeafFolder, scales: dict[str, Stored], extra: dict[str, Stored], ue8m0: bool, bar):
        self.scales, self.extra, self.ue8m0, self.bar = scales, extra, ue8m0, bar
        self.leaf = functools.cache(leaves.open)  # the Hub's order goes through all leaves, layer by layer

    def rows(self, t: HubTensor, weights: Planned, scale: Planned | None) -> Iterator[np.ndarray]:
        """What write_shards takes for the tensor, and for its scales behind it."""
        found = []
        for place in pieces(t):
            where = t.file_slices(place)
            if t.name in self.extra:
                rows = self.extra[t.name].read(*where)
            else:
                block = self.leaf(t.leaf)[(*t.index, *place)].read().result()
                rows, its_scale = self._format(np.ascontiguousarray(t.to_hub(block)), t, where, weights)
                found += [its_scale] if scale else []
            self.bar.update(rows.nbytes)
            yield rows
        if scale:
            whole = np.concatenate(found).astype(DTYPES[scale.dtype])
            self.bar.update(whole.nbytes)
            yield whole

    def _format(self, rows: np.ndarray, t: HubTensor, where: tuple[slice, ...], weights: Planned):
        if weights.dtype != "F8_E4M3":
            return rows.astype(DTYPES[weights.dtype]), None
        kept = self.scales.get(t.name + fp8.SUFFIX)
        if kept is None:
            return fp8.quantise(rows.astype(np.float32), self.ue8m0)
        return fp8.requantise(rows, kept.read(fp8.blocks_of(where[0])).astype(np.float32), self.ue8m0)


def _import_leaf(hub: HubCheckpoint, leaf: str, group: list[HubTensor], kind: np.dtype, out: LeafFolder, pool, bar):
    """Every tensor of one leaf, piece by piece, each piece a whole chunk on disk."""
    first = group[0]
    stacked = tuple(max(t.index[axis] for t in group) + 1 for axis in range(len(first.index)))
    chunk = tuple(s.stop for s in pieces(first)[0])
    store = out.create(leaf, (*stacked, *first.part), kind, (*(1,) * len(stacked), *chunk))

    def move(task: tuple[HubTensor, tuple[slice, ...]]) -> int:
        t, place = task
        block = hub.read(t, place)
        store[(*t.index, *place)].write(np.ascontiguousarray(block.astype(kind))).result()
        return block.size * hub.files[t.name].itemsize

    for n_bytes in pool.map(move, ((t, place) for t in group for place in pieces(t))):
        bar.update(n_bytes)


def _by_leaf(tensors: list[HubTensor]) -> dict[str, list[HubTensor]]:
    leaves: dict[str, list[HubTensor]] = {}
    for t in tensors:
        if not t.copy:
            leaves.setdefault(t.leaf, []).append(t)
    return leaves


def _kept_dtype(hub: HubCheckpoint, leaf: str, group: list[HubTensor], dtype: str | None) -> np.dtype:
    """float32 or bfloat16: what was asked for, or the widest of the leaf's tensors."""
    if dtype == "float32" or (dtype and group[0].n_in is not None and not leaf.endswith("router/weight")):
        return DTYPES[{"float32": "F32", "bfloat16": "BF16"}[dtype]]
    kinds = {hub.files[t.name].dtype for t in group}
    return np.dtype(ml_dtypes.bfloat16 if kinds <= {"BF16", "F8_E4M3"} else np.float32)


def _absent_biases(model: ModelConfig, leaves) -> dict[str, tuple[int, int]]:
    """Router biases of a model without them: zeros."""
    both = {"router_bias/moe": model.num_moe_layers, "router_bias/mtp": model.num_nextn_predict_layers}
    return {leaf: (n, model.n_routed_experts) for leaf, n in both.items() if n and leaf not in leaves}


def _run_files(hub: HubCheckpoint, folder: Path, dtype: str | None, say: Say) -> None:
    """config.json of the run, and what it needs for text."""
    raw, model = hub.config.raw, hub.model
    alpha = raw.get("aux_loss_alpha") or 0.0
    balance = BalanceConfig(sequence=alpha) if model.topk_method == "noaux_tc" else BalanceConfig(expert=alpha)
    config = Config(
        name=hub.folder.resolve().name,
        seq_len=min(4096, model.max_position_embeddings),
        model=model,
        balance=balance,
        data=DataConfig(tokenizer="run"),
        compute=ComputeConfig(precision=PLAIN[dtype or "bfloat16"]),
    )
    if (hub.folder / "tokenizer.json").is_file():
        Tokenizer.load(hub.folder)  # raises for a damaged one
    else:
        say("tokenizer.json: not there; `dsjax generate` and `dsjax train` need one in the run folder")
    copy_text(hub.folder, folder)
    configuration.save(config, folder / "config.json")


def _keep_side(hub: HubCheckpoint, side: Path, differing: list[HubTensor], say: Say) -> None:
    side.mkdir()
    shutil.copyfile(hub.folder / "config.json", side / "config.json")
    write_json(side / "source.json", {"folder": str(hub.folder.absolute())})
    (side / "tensors.json").write_text(json.dumps({t.name: hub.files[t.name].dtype for t in hub.tensors}, indent=0))
    scales = [t.name + fp8.SUFFIX for t in hub.tensors if hub.scale(t.name)]
    for file, names in (("scales", scales), ("extra", [t.name for t in differing])):
        if names:
            _copy_tensors(hub, names, side / f"{file}.safetensors")
    if differing:
        say(
            f"{', '.join(t.name for t in differing)}: not equal to the shared weights; kept in hub/ for export, and "
            "multi-token prediction here reads the shared ones"
        )


def _copy_tensors(hub: HubCheckpoint, names: list[str], file: Path) -> None:
    stored = {name: hub.files[name] for name in names}

    def rows(s: Stored) -> Iterator[np.ndarray]:
        step = max(1, (32 << 20) * s.shape[0] // s.n_bytes)
        return (s.read(slice(at, at + step)) for at in range(0, s.shape[0], step))

    planned = [Planned(name, s.dtype, s.shape) for name, s in stored.items()]
    write_shards(file.parent, [planned], (r for s in stored.values() for r in rows(s)))
    (file.parent / "model.safetensors").rename(file)


def _out_dtype(t: HubTensor, given: str | None, dtype: str | None, fp8_blocks: bool) -> str:
    if fp8_blocks and t.fp8:
        return "F8_E4M3"
    if dtype == "float32":
        return "F32"
    if given and not (dtype and t.n_in is not None):
        return "BF16" if given == "F8_E4M3" else given
    return "F32" if t.name.endswith("e_score_correction_bias") else "BF16"


def copy_text(source: Path, target: Path) -> None:
    """Copies what a run or Hub folder has for text: the tokenizer's files, and the chat template."""
    for name in TEXT_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _text_files(run: Path, folder: Path, made_here: bool, say: Say) -> dict:
    """Copies the tokenizer's files, and makes those that a run of ours has not; returns its ids for config.json."""
    copy_text(run, folder)
    if not (run / "tokenizer.json").is_file():
        say("tokenizer.json: the run has none, and the export neither")
        return {}
    if not made_here:
        return {}
    tokenizer = Tokenizer.load(run)
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    names = {name: tokenizer.backend.id_to_token(id) for name, id in ids.items()}
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    return {f"{name}_id": id for name, id in ids.items()}


def _find_checkpoint(source: Path, step: int | None) -> tuple[Path, int]:
    """The run folder and the step, from either or from run/checkpoints/STEP."""
    if source.parent.name == "checkpoints" and source.name.isdigit() and step is None:
        source, step = source.parent.parent, int(source.name)
    if not (source / "config.json").is_file():
        raise ConfigError(f"{source}: expected a run folder, or a checkpoint in one; there is no config.json")
    if not has_checkpoint(source):
        raise ConfigError(f"{source}: no checkpoint here yet; `dsjax train {source}` makes one")
    with Checkpoints(source, read_only=True) as checkpoints:
        return source, checkpoints.find(step)


@contextlib.contextmanager
def _beside(target: Path | str, n_bytes: int) -> Iterator[Path]:
    """A folder beside `target` that takes its name when all is done, and is removed when it is not."""
    target = Path(target).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{show(str(target))}: is there already; expected a new folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if n_bytes > free:
        raise ConfigError(
            f"{target.parent}: {n_bytes / 1e9:.1f} GB are to be written, and {free / 1e9:.1f} GB are free"
        )
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield folder
        os.chmod(folder, 0o755)
        if target.exists():
            target.rmdir()
        folder.rename(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _bar(total: int, what: str, show_it: bool) -> tqdm:
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=not show_it or None, leave=False)
