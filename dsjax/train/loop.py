"""The training run: one loop around one jitted step, in a run folder from which it can always go on.

    train(configs.load("tiny"), Path("runs/tiny"))

The folder holds config.json, tokenizer.json, data/ (tokens), checkpoints/, metrics.jsonl, tensorboard/ and loss.png.
"""

import contextlib
import fcntl
import functools
import math
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from dsjax import config as configuration
from dsjax.config import Config, ConfigError
from dsjax.data.pipeline import Corpus, TrainRows, batches, heldout_rows, load_corpus
from dsjax.state import Batch, Metrics, TrainState
from dsjax.train.checkpoint import Checkpoints, abstract_state
from dsjax.train.metrics import Recorder
from dsjax.train.schedule import Schedule
from dsjax.train.step import heldout_nats, jit_init_state, jit_train_step
from sharding.mesh import MeshError, make_mesh
from sharding.rules import spec

# (model, router_bias, tokenizer, config, prompt, **options) -> pieces of text
Sampler = Callable[..., Iterator[str]]

# Changes that a run may be resumed with: the rest would make it another run.
_RESUMABLE = (
    "steps",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "keep_checkpoints",
    "max_skipped_steps",
    "mesh.",
    "compute.",
)


def train(
    config: Config,
    run_folder: Path | str,
    *,
    quiet: bool = False,
    explicit: dict[str, Any] | None = None,
    sampler: Sampler | None = None,
) -> dict[str, Any]:
    """Trains, or resumes the run that the folder holds; returns the last held-out numbers.

    A run that exists keeps its own configuration, changed by `explicit` (dotted name -> value). SIGTERM and Ctrl-C end
    it after the step, with a checkpoint. `sampler` writes a sample continuation at every evaluation.

    Raises ConfigError for what the user can mend: settings, data, a mesh that the devices do not make, a run folder of
    another run or in use, or max_skipped_steps steps with NaN or Inf in a row.
    """
    run_folder = Path(run_folder)
    say = functools.partial(tqdm.write, file=sys.stderr)
    with _owned(run_folder):
        config = _adopt(config, run_folder, explicit or {}, say)
        mesh = device_mesh(config)
        configuration.save(config, run_folder / "config.json")
        corpus = load_corpus(config.data, config.model.vocab_size, run_folder, seed=config.seed, progress=not quiet)
        say(_describe(corpus, config))
        with jax.set_mesh(mesh), Checkpoints(run_folder, config.keep_checkpoints) as checkpoints:
            return _Run(config, run_folder, mesh, corpus, checkpoints, quiet, say, sampler).go()


def evaluate(
    run_folder: Path | str, changes: dict[str, Any] | None = None, *, step: int | None = None
) -> dict[str, Any]:
    """Held-out numbers of a run's checkpoint (the newest by default), on its own corpus or on that of `changes`.

    Bits per byte stand beside those of gzip -9 and xz -9 on the same bytes.
    """
    run_folder = Path(run_folder)
    config = configuration.override(configuration.load(run_folder / "config.json"), changes or {})
    mesh = device_mesh(config)
    with jax.set_mesh(mesh), Checkpoints(run_folder, read_only=True) as checkpoints:
        own = configuration.load(run_folder / "config.json").data
        state = checkpoints.restore_model(step, abstract_state(config, mesh))
        corpus = load_heldout(config, run_folder, own_data=own)
        return Heldout(corpus, config, mesh)(state)


class Heldout:
    """The held-out text, and how well a state predicts it."""

    def __init__(self, corpus: Corpus, config: Config, mesh):
        self.config, self.facts = config, corpus.facts
        self.n_bytes = len(corpus.heldout_text)
        rows = heldout_rows(corpus, config.seq_len)
        size = config.batch_size // config.accumulate
        pad = -len(rows["tokens"]) % size
        rows = {name: np.pad(a, ((0, pad), (0, 0))) for name, a in rows.items()}
        self.batches = [
            to_device({name: a[i : i + size] for name, a in rows.items()}, mesh, whole=True)
            for i in range(0, len(rows["tokens"]), size)
        ]
        self.nats = jax.jit(functools.partial(heldout_nats, config=config))

    def __call__(self, state: TrainState) -> dict[str, Any]:
        """Nats a token and bits per byte, those of the averaged weights too if the run keeps them."""
        result = self._measure(state.model, state)
        if state.ema is not None:
            result |= {f"ema_{name}": value for name, value in self._measure(state.ema, state).items()}
        return result | {name: self.facts[name] for name in ("gzip_bpb", "xz_bpb")}

    def _measure(self, model, state) -> dict[str, float]:
        nats, tokens = sum(np.asarray(self.nats(model, b, state.router_bias), np.float64) for b in self.batches)
        return {"heldout_nats": nats / tokens, "heldout_bpb": nats / math.log(2) / self.n_bytes}


class _Run:
    """One call of `train`, past the reading of settings and data."""

    def __init__(self, config, run_folder, mesh, corpus, checkpoints, quiet, say, sampler):
        self.config, self.folder, self.mesh, self.corpus = config, run_folder, mesh, corpus
        self.checkpoints, self.quiet, self.say, self.sampler = checkpoints, quiet, say, sampler
        self.schedule = Schedule(config)
        self.heldout = Heldout(corpus, config, mesh)
        self.stop_signal: str | None = None

    def go(self) -> dict[str, Any]:
        first, state = self._start()
        self.recorder = Recorder(self.folder, first)
        if first == 0:
            self.recorder.write("run", 0, {"facts": self.corpus.facts, **machine()})
        last_row = next((row for row in reversed(self.recorder.rows) if row["kind"] == "eval"), None)
        try:
            with self._signals():
                if first < self.config.steps:
                    state, last_row = self._steps(first, state)
                else:
                    self.say(f"all {self.config.steps} steps are done; --steps gives it more, --run another folder")
                    if last_row is None:
                        last_row = self._evaluate(first, state)
        finally:
            self.recorder.close()
        if self.stop_signal:
            self.say(f"{self.stop_signal}: saved; the same command goes on from here")
        self._farewell()
        return last_row or {}

    def _start(self) -> tuple[int, TrainState]:
        step = self.checkpoints.latest()
        if step is None:
            return 0, jit_init_state(self.config)()
        self.say(f"resuming {self.folder} at step {step}")
        return step, self.checkpoints.restore(step, abstract_state(self.config, self.mesh))

    def _steps(self, first: int, state: TrainState):
        config, step_fn = self.config, jit_train_step(self.config)
        rows = TrainRows(self.corpus, config.data, config.seq_len, config.seed)
        data = batches(
            rows,
            self.schedule.rows,
            first,
            config.steps,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        last_row, since, waiting = None, time.perf_counter(), []
        bar = tqdm(
            total=config.steps,
            initial=first,
            unit="step",
            disable=self.quiet or None,
            dynamic_ncols=True,
            file=sys.stderr,
        )
        with bar:
            for step, arrays in data:
                batch = self._batch(arrays, step)
                state, metrics = step_fn(state, batch, self.schedule.at(step))
                waiting.append(metrics)
                step += 1
                bar.update()
                self._check(waiting[-2:-1] if step < config.steps else waiting[-1:], step)
                if step % config.log_every == 0 or step == config.steps:
                    row = self._log(step, waiting, time.perf_counter() - since)
                    bar.set_postfix_str(f"loss {row['loss']:.3f}, {row['tokens_per_s']:.0f} tok/s", refresh=False)
                    since, waiting = time.perf_counter(), waiting[-1:] if step == config.steps else []
                stop = self.stop_signal is not None
                if step % config.eval_every == 0 or step == config.steps:
                    last_row = self._evaluate(step, state)
                    since = time.perf_counter()
                if step % config.checkpoint_every == 0 or step == config.steps or stop:
                    self.checkpoints.save(step, state)
                if stop:
                    break
        self.checkpoints.wait()
        self.recorder.draw()
        return state, last_row

    def _batch(self, arrays: dict[str, np.ndarray], step: int) -> Batch:
        """[A, B, T] micro-batches; a batch that is still growing is filled up with padding that no step takes."""
        config = self.config
        if not config.data.document_mask:
            arrays = one_document(arrays)
        rows = config.batch_size // config.accumulate // jax.process_count()
        arrays = {name: a.reshape(-1, rows, a.shape[-1]) for name, a in arrays.items()}
        more = config.accumulate - len(arrays["tokens"])
        return to_device({name: np.pad(a, ((0, more), (0, 0), (0, 0))) for name, a in arrays.items()}, self.mesh)

    def _check(self, metrics: list[Metrics], step: int) -> None:
        """Stops a run whose numbers stay broken. Looks one step back, so that no step waits for the host."""
        for m in metrics:
            if (n := int(m.skipped_in_a_row)) >= self.config.max_skipped_steps:
                raise ConfigError(
                    f"training stopped at step {step}: {n} steps in a row had NaN or Inf in the loss or gradients (loss "
                    f"{float(m.loss):g}, gradient norm {float(m.grad_norm):g}); the last checkpoint is intact; try a "
                    f"lower --optimizer.peak-lr than {self.config.optimizer.peak_lr:g}"
                )

    def _log(self, step: int, waiting: list[Metrics], seconds: float) -> dict[str, Any]:
        values = [jax.device_get(m) for m in waiting]
        load = np.concatenate([sum(v.load.moe for v in values), sum(v.load.mtp for v in values)])
        first_row = self.schedule.first_row(step - len(values))
        tokens = (self.schedule.first_row(step) - first_row) * self.config.seq_len
        knobs = self.schedule.at(step - 1)
        row = {
            "loss": float(np.mean([v.loss for v in values])),
            "mtp_loss": np.mean([v.mtp_loss for v in values], axis=0).tolist(),
            "balance_loss": float(np.mean([v.balance_loss for v in values])),
            "grad_norm": float(np.mean([v.grad_norm for v in values])),
            "max_vio": np.mean([v.max_vio for v in values], axis=0).tolist(),
            "max_vio_mean": float(np.mean([v.max_vio for v in values])) if load.size else 0.0,
            "load": load.astype(int).tolist(),
            "learning_rate": knobs.learning_rate,
            "mtp_weight": knobs.mtp_weight,
            "bias_update_speed": knobs.bias_update_speed,
            "skipped": int(values[-1].skipped),
            "tokens": self.schedule.first_row(step) * self.config.seq_len,
            "tokens_per_s": tokens / seconds,
        }
        self.recorder.write("train", step, row)
        if self.quiet:
            left = (self.config.steps - step) / len(values) * seconds
            self.say(
                f"step {step}/{self.config.steps} loss {row['loss']:.4f} lr {row['learning_rate']:.3g} "
                f"grad_norm {row['grad_norm']:.3f} max_vio {row['max_vio_mean']:.3f} skipped {row['skipped']} "
                f"{row['tokens_per_s']:.0f} tok/s, {left:.0f} s left"
            )
        return row

    def _evaluate(self, step: int, state: TrainState) -> dict[str, Any]:
        result = self.heldout(state)
        self.recorder.write("eval", step, result)
        recent = next((row for row in reversed(self.recorder.rows) if row["kind"] == "train"), {"max_vio_mean": 0.0})
        self.say(
            f"step {step}: held-out {result['heldout_nats']:.4f} nats a token, {result['heldout_bpb']:.3f} bits per byte "
            f"(gzip -9 {result['gzip_bpb']:.3f}, xz -9 {result['xz_bpb']:.3f}), MaxVio {recent['max_vio_mean']:.2f}"
        )
        self.recorder.draw()
        if self.sampler and jax.process_count() == 1 and self.mesh.size == 1:
            prompt = self.corpus.tokenizer.decode(self.corpus.heldout[0][:24].tolist())
            text = self.sampler(
                state.model,
                state.router_bias,
                self.corpus.tokenizer,
                self.config,
                prompt,
                max_tokens=min(48, self.config.model.max_position_embeddings - 25),
                temperature=0.7,
                top_p=0.95,
                seed=self.config.seed,
            )
            self.say("  sample: " + repr(prompt[-40:]) + " -> " + repr("".join(text)))
        return {"step": step, **result}

    def _farewell(self) -> None:
        step = self.checkpoints.latest()
        self.say(f"checkpoint: {self.folder / 'checkpoints' / str(step)}")
        self.say(f"pictures:   {self.folder / 'loss.png'}, tensorboard --logdir {self.folder / 'tensorboard'}")
        self.say(f'generate:   dsjax generate {self.folder} --prompt "def "')

    @contextlib.contextmanager
    def _signals(self):
        """SIGTERM and Ctrl-C end the run after the step; a second Ctrl-C ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number, _):
            if self.stop_signal and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.stop_signal = signal.Signals(number).name

        old = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


def device_mesh(config: Config):
    """The mesh of a configuration on this machine's devices. Raises ConfigError with the arithmetic if it cannot be."""
    sizes = vars(config.mesh)
    try:
        mesh = make_mesh(**sizes)
    except MeshError as error:
        raise ConfigError(str(error)) from None
    m, shape = config.model, mesh.shape
    tokens = shape["data"] * shape["fsdp"] * shape["expert"]
    for field, value, axes, size in (
        ("batch_size / accumulate", config.batch_size // config.accumulate, "data * fsdp * expert", tokens),
        ("seq_len", config.seq_len, "context", shape["context"]),
        ("model.n_routed_experts", m.n_routed_experts, "expert", shape["expert"]),
        ("model.hidden_size", m.hidden_size, "fsdp", shape["fsdp"]),
        ("model.num_attention_heads", m.num_attention_heads, "tensor", shape["tensor"]),
        ("model.intermediate_size", m.intermediate_size, "tensor", shape["tensor"]),
        ("model.moe_intermediate_size", m.moe_intermediate_size, "tensor", shape["tensor"]),
        ("model.vocab_size", m.vocab_size, "tensor", shape["tensor"]),
        ("the number of pipeline stages", 1, "stage", shape["stage"]),
    ):
        if value % size:
            raise ConfigError(f"mesh: {axes} = {size} does not divide {field} = {value}")
    return mesh


def one_document(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rows as V3's pre-training sees them: one document each, attention across what was packed together."""
    segment_ids = np.minimum(arrays["segment_ids"], 1)
    positions = np.broadcast_to(np.arange(segment_ids.shape[-1], dtype=np.int32), segment_ids.shape)
    return arrays | {"segment_ids": segment_ids, "positions": positions}


def machine() -> dict[str, Any]:
    """What a result was measured on."""
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
    }


def to_device(arrays: dict[str, np.ndarray], mesh, whole: bool = False) -> Batch:
    """A Batch laid out on the mesh, from this process's rows, or from the `whole` batch."""
    some = arrays["tokens"]
    names = (*(None,) * (some.ndim - 2), "batch", "seq")
    sharding = jax.NamedSharding(mesh, spec(*names))
    place = (
        (lambda a: jax.device_put(a, sharding))
        if whole
        else (lambda a: jax.make_array_from_process_local_data(sharding, a))
    )
    return Batch(*(place(arrays[name]) for name in ("tokens", "segment_ids", "positions")))


def load_heldout(config: Config, run_folder: Path, own_data) -> Corpus:
    """The corpus to evaluate on, by the run's own tokenizer."""
    if config.data == own_data:
        return load_corpus(config.data, config.model.vocab_size, run_folder, seed=config.seed, progress=False)
    data = configuration.replace(
        config.data, tokenizer=str(run_folder / "tokenizer.json"), heldout_fraction=config.data.heldout_fraction
    )
    return load_corpus(data, config.model.vocab_size, run_folder / "eval", seed=config.seed, progress=False)


def _adopt(config: Config, run_folder: Path, explicit: dict[str, Any], say) -> Config:
    """The configuration to run with: that of the folder, if it holds a run, with the explicit changes."""
    path = run_folder / "config.json"
    if not path.exists():
        return config
    saved = configuration.load(path)
    if saved.name != config.name:
        raise ConfigError(f"{run_folder}: holds a run of preset {saved.name}, not {config.name}; choose another --run")
    wanted = configuration.override(saved, explicit)
    before = dict((name, value) for name, value, _ in configuration.field_rows(saved))
    for name, value, _ in configuration.field_rows(wanted):
        if value == before.get(name):
            continue
        if not name.startswith(_RESUMABLE) and (run_folder / "checkpoints").exists():
            raise ConfigError(
                f"{name}={configuration.show(value)}: the run in {run_folder} has {before.get(name)}; a run cannot change "
                "it, choose another --run"
            )
        say(f"changed: {name} {before.get(name)} -> {value}")
    return wanted


@contextlib.contextmanager
def _owned(run_folder: Path):
    """Makes the run folder, and keeps other processes out of it."""
    run_folder.mkdir(parents=True, exist_ok=True)
    with (run_folder / "lock").open("w") as lock:
        if jax.process_index() == 0:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"{run_folder}: another process is training here; choose another --run") from None
        yield


def _describe(corpus: Corpus, config: Config) -> str:
    f = corpus.facts
    return "\n".join(f"{name}: {value}" for name, value in f.items())
