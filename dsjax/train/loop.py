"""The training run: one loop around one jitted step, in a run folder from which it can always go on.

    train(configs.load("tiny"), Path("runs/tiny"))

The folder holds config.json, tokenizer.json, data/ (tokens), checkpoints/, metrics.jsonl, tensorboard/ and loss.png.
"""

import contextlib
import functools
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsjax.config import Config, ConfigError, more_room, replace
from dsjax.data.pipeline import Corpus, TrainRows, batches, load_corpus
from dsjax.state import Batch, Metrics, TrainState
from dsjax.train import processes
from dsjax.train.checkpoint import Checkpoints, abstract_state
from dsjax.train.folder import adopt, owned
from dsjax.train.heldout import Heldout, evaluate
from dsjax.train.layout import device_mesh, devices, on_mesh, one_document, share_of
from dsjax.train.metrics import Interval, Recorder
from dsjax.train.report import Report, corpus_rows, farewell_rows, plan_rows
from dsjax.train.schedule import Schedule
from dsjax.train.step import jit_init_state, jit_train_step, start_state

__all__ = ["evaluate", "train"]

# (model, router_bias, tokenizer, config, prompt, **options) -> pieces of text
Sampler = Callable[..., Iterator[str]]
SIGNALS = ("SIGTERM", "Ctrl-C")
PROMPT_TOKENS, SAMPLE_TOKENS = 24, 48


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
    another run or in use, a checkpoint that cannot be read or written, or max_skipped_steps steps with NaN or Inf in a
    row.
    """
    run_folder = Path(run_folder)
    processes.start(config.distributed)
    devices()
    report = Report(quiet)
    signals = Signals()

    def prepare(make: bool) -> tuple[Config, Any, Corpus]:
        adopted = adopt(config, run_folder, explicit or {}, report.say)
        mesh, text, progress = device_mesh(adopted), adopted.data, make and not report.quiet
        return (
            adopted,
            mesh,
            load_corpus(text, adopted.model.vocab_size, run_folder, seed=adopted.seed, progress=progress, make=make),
        )

    try:
        with processes.together(config.distributed.heartbeat_timeout_s), signals, owned(run_folder):
            config, mesh, corpus = processes.first_alone(prepare)
            report.table(corpus_rows(corpus.facts) + plan_rows(config, mesh, corpus.facts))
            checkpoints = Checkpoints(run_folder, config.keep_checkpoints)
            with jax.set_mesh(mesh), checkpoints, processes.together():
                return Run(config, run_folder, mesh, corpus, checkpoints, report, signals, sampler).go()
    except Stopped as stop:
        report.say(f"{stop}: ended before a step was taken; `dsjax train {run_folder}` starts again")
        return {}


class Run:
    """One call of `train`, past the reading of settings and data."""

    def __init__(self, config, run_folder, mesh, corpus, checkpoints, report, signals, sampler):
        self.config: Config = config
        self.folder: Path = run_folder
        self.mesh = mesh
        self.corpus: Corpus = corpus
        self.checkpoints: Checkpoints = checkpoints
        self.report: Report = report
        self.signals: Signals = signals
        self.sampler: Sampler | None = sampler
        self.schedule = Schedule(config)
        self.heldout = Heldout(corpus, config, mesh)
        self.agreed = processes.Agreement(mesh, SIGNALS)
        self.share = share_of(mesh.local_devices, mesh, config.batch_size // config.accumulate)

    def go(self) -> dict[str, Any]:
        """The steps that are left, each evaluation that is due, and where everything is."""
        config, report = self.config, self.report
        first, state = self._start()
        self.recorder = Recorder(self.folder, first, write=jax.process_index() == 0)
        try:
            self._remember_corpus(first)
            if first >= config.steps:
                report.say(
                    f"{first} of {config.steps} steps are done; --steps=N gives it more, --run=PATH a fresh start"
                )
            if first and self._due(first, config.eval_every) and not self._evaluated(first):
                self._evaluate(first, state)
            done = self._steps(first, state)
            self.recorder.draw(at_once=True)  # with no step left too: a kill may have come before the last picture
        finally:
            report.close()
            self.recorder.close()
        if done < config.steps:
            report.say(f"{self.signals.name}: saved at step {done}; `dsjax train {self.folder}` goes on from there")
        report.table(farewell_rows(config, self.folder, self.checkpoints.latest()))
        last = self.recorder.last("eval")
        return {name: value for name, value in last.items() if name not in ("kind", "time")} if last else {}

    def _start(self) -> tuple[int, TrainState]:
        """The step to begin with and the state before it."""
        step = self.checkpoints.latest()
        if step is None:
            self.interval = Interval()
            return 0, jit_init_state(self.config)()
        like = abstract_state(self.config, self.mesh)
        if self.checkpoints.weights_alone(step):
            self.report.say(f"starting from the weights in {self.folder}")
            self.interval = Interval()
            given = self.checkpoints.restore_model(step, like.replace(ema=None))
            start = jax.jit(functools.partial(start_state, config=self.config), donate_argnums=(0, 1))
            return 0, start(given.model, given.router_bias)
        self.report.say(f"resuming {self.folder} at step {step}")
        state, notes = self.checkpoints.restore(step, like)
        self.interval = Interval(notes)
        return step, state

    def _remember_corpus(self, first: int) -> None:
        """Keeps the facts with the run. Raises ConfigError if they are not those that it began with."""
        facts, run = self.corpus.facts, self.recorder.last("run")
        if run is None:
            m = self.config.model
            layers = [f"layer {k}" for k in range(m.first_k_dense_replace + 1, m.num_hidden_layers + 1)]
            layers += [f"MTP {k + 1}" for k in range(m.num_nextn_predict_layers)]
            title = f"{self.config.name}, {', '.join(facts['sources'])}, sha256 {facts['sha256'][:12]}"
            self.recorder.write("run", first, {"title": title, "layers": layers, "facts": facts, **machine()})
            return
        for name in ("sha256", "train", "heldout", "tokenizer", "vocab_size"):
            if run["facts"][name] != facts[name]:
                raise ConfigError(
                    f"data.sources={','.join(self.config.data.sources)}: not the text that the run in {self.folder} "
                    f"began with ({name} is {facts[name]}, was {run['facts'][name]}); choose another --run"
                )

    def _steps(self, first: int, state: TrainState) -> int:
        """Steps from `first` to the last, or to a signal; returns how many are done."""
        config, report, done = self.config, self.report, first
        if first >= config.steps:
            return done
        step_fn, data, pending, self.taken = jit_train_step(config), self._data(first), [], first
        self.signals.patient = True
        report.say("compiling the training step ...")
        started = time.perf_counter()
        while done < config.steps:
            step, arrays = next(data)
            state, metrics = step_fn(state, self._batch(arrays), self.schedule.at(step))
            pending, done = [*pending, metrics], step + 1
            if started is not None:
                jax.block_until_ready(metrics)
                report.say(f"the first step took {time.perf_counter() - started:.0f} s, with its compilation")
                if report.bar is None:
                    report.start_bar(first, config.steps)
                self.clock, self.clock_step, started = time.perf_counter(), done, None
            stop = self.agreed(self.signals.name)
            log, save, evaluate = (
                self._due(done, every) for every in (config.log_every, config.checkpoint_every, config.eval_every)
            )
            if not (
                log or save or evaluate or stop
            ):  # the newest may wait, so that the device never waits for the host
                ready, pending = pending[:-1], pending[-1:]
            else:
                ready, pending = pending, []
            if not all(map(self._take, ready)):
                self.config = replace(self.config, compute=more_room(self.config.compute))
                step_fn, data, pending, done = jit_train_step(self.config), self._data(self.taken), [], self.taken
                started = time.perf_counter()
                continue
            if log:
                self._log(done)
            with self._clock_stands():
                if save or stop:
                    self.checkpoints.save(done, state, self.interval.notes)
                if stop:
                    self.signals.name = stop
                    break
                if evaluate:
                    self._evaluate(done, state)
        self.checkpoints.wait()
        return done

    def _due(self, done: int, every: int) -> bool:
        return done % every == 0 or done == self.config.steps

    def _data(self, first: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        config = self.config
        return batches(
            TrainRows(self.corpus, config.data, config.seq_len, config.seed),
            self.schedule.rows,
            first,
            config.steps,
            micro_batch=self.share.total,
            mine=self.share.rows,
        )

    def _batch(self, arrays: dict[str, np.ndarray]) -> Batch:
        """[A, B, T] micro-batches; a batch that is still growing is filled up with padding that no step takes."""
        config = self.config
        if not config.data.document_mask:
            arrays = one_document(arrays)
        arrays = {name: a.reshape(-1, len(self.share.rows), a.shape[-1]) for name, a in arrays.items()}
        more = config.accumulate - len(arrays["tokens"])
        arrays = {name: np.pad(a, ((0, more), (0, 0), (0, 0))) for name, a in arrays.items()}
        return on_mesh(arrays, self.mesh, self.share)

    def _take(self, metrics: Metrics) -> bool:
        """Waits for the metrics of the next step to be taken; False if it did nothing, for want of room for its rows.

        Raises ConfigError if too many steps in a row were skipped.
        """
        metrics, compute = jax.device_get(metrics), self.config.compute
        if metrics.overflow and compute.on_overflow == "redo":
            self.report.say(
                f"step {self.taken + 1}: {metrics.overflow:,} rows had no room on their experts' devices "
                f"(--compute.expert-buffer={compute.expert_buffer:g}); compiling the step again with twice the room ..."
            )
            return False
        self.taken += 1
        self.report.step()
        self.interval.add(metrics)
        if (n := int(metrics.skipped_in_a_row)) >= self.config.max_skipped_steps:
            with contextlib.suppress(ConfigError):  # of several processes, each would end while the others write
                self.checkpoints.wait()
            kept = self.checkpoints.latest()
            rest = "there is no checkpoint yet" if kept is None else f"checkpoint {kept} is intact"
            raise ConfigError(
                f"stopped at step {self.taken}: NaN or Inf in the loss or gradients of {n} steps in a row (loss "
                f"{float(metrics.loss):g}, gradient norm {float(metrics.grad_norm):g}); {rest}; try an "
                f"--optimizer.peak-lr below {self.config.optimizer.peak_lr:g}"
            )
        return True

    def _log(self, done: int) -> None:
        now, knobs = time.perf_counter(), self.schedule.at(done - 1)
        steps, seconds = done - self.clock_step, now - self.clock
        rows = self.schedule.first_row(done) - self.schedule.first_row(self.clock_step)
        row = self.recorder.write(
            "train",
            done,
            {
                **self.interval.row(),
                "learning_rate": knobs.learning_rate,
                "mtp_weight": knobs.mtp_weight,
                "bias_update_speed": knobs.bias_update_speed,
                "tokens": self.schedule.first_row(done) * self.config.seq_len,
                "tokens_per_s": rows * self.config.seq_len / seconds if steps else None,
            },
        )
        self.report.interval(row, self.config.steps, (self.config.steps - done) * seconds / steps if steps else None)
        self.interval, self.clock, self.clock_step = Interval(), time.perf_counter(), done

    @contextlib.contextmanager
    def _clock_stands(self):
        """What happens between steps is no part of the tokens a second."""
        before = time.perf_counter()
        yield
        self.clock += time.perf_counter() - before

    def _evaluated(self, step: int) -> bool:
        row = self.recorder.last("eval")
        return row is not None and row["step"] == step

    def _evaluate(self, step: int, state: TrainState) -> None:
        self.report.evaluation(self.recorder.write("eval", step, self.heldout(state)))
        if self.sampler and self.mesh.size == 1:
            self._sample(step, state)
        self.recorder.draw()

    def _sample(self, step: int, state: TrainState) -> None:
        """A continuation of the first held-out document, if the model's context has room for one."""
        tokenizer = self.corpus.tokenizer
        prompt = tokenizer.decode(self.corpus.heldout[0][:PROMPT_TOKENS]).rstrip("\ufffd")
        room = self.config.model.max_position_embeddings - 1 - len(tokenizer.encode(prompt))
        if room < 1:
            return
        pieces = self.sampler(
            state.model,
            state.router_bias,
            tokenizer,
            self.config,
            prompt,
            max_tokens=min(SAMPLE_TOKENS, room),
            temperature=0.7,
            top_p=0.95,
            seed=self.config.seed,
        )
        self.report.sample(step, prompt, "".join(pieces))


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
