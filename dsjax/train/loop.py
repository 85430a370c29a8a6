"""The training run: one loop around one jitted step, in a run folder from which it can always go on.

    train(configs.load("tiny"), Path("runs/tiny"))

The folder holds config.json, tokenizer.json, data/ (tokens), checkpoints/, metrics.jsonl, tensorboard/ and loss.png;
goodput.jsonl and incidents.jsonl tell of its course, skipped.jsonl and spikes/ of loss spikes.
"""

import contextlib
import functools
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsjax.config import Config, ConfigError, ModelConfig, more_room, replace
from dsjax.data.pipeline import Corpus, batches, load_corpus, train_rows
from dsjax.state import Batch, Metrics, TrainState
from dsjax.train import phase, processes
from dsjax.train.average import begin
from dsjax.train.checkpoint import Checkpoints, abstract_state, names
from dsjax.train.corruption import CorruptionCheck
from dsjax.train.feed import Feed, Stalled
from dsjax.train.folder import adopt, owned
from dsjax.train.heldout import Heldout, evaluate
from dsjax.train.journal import Goodput, Incidents
from dsjax.train.layout import device_mesh, devices, on_mesh, one_document, share_of
from dsjax.train.ledger import Ledger, Passing
from dsjax.train.metrics import Interval, Recorder, no_room
from dsjax.train.profile import Profile
from dsjax.train.report import Report, corpus_rows, farewell_rows, plan_rows
from dsjax.train.schedule import Schedule
from dsjax.train.signals import NAMES, Signals, Stopped
from dsjax.train.spikes import dump
from dsjax.train.step import jit_init_state, jit_train_step, start_state

__all__ = ["evaluate", "train"]

# (model, router_bias, tokenizer, config, prompt, **options) -> pieces of text
Sampler = Callable[..., Iterator[str]]
Ready = Callable[[Config, bool], Config]
PROMPT_TOKENS, SAMPLE_TOKENS = 24, 48


def train(
    config: Config,
    run_folder: Path | str,
    *,
    quiet: bool = False,
    explicit: dict[str, Any] | None = None,
    source: Path | str | None = None,
    sampler: Sampler | None = None,
    profile: tuple[int, int] | None = None,
    began: float | None = None,
    weights_alone: bool = False,
    ready: Ready | None = None,
) -> dict[str, Any]:
    """Trains, or resumes the run that the folder holds; returns the last held-out numbers.

    A run that exists keeps its own configuration, changed by `explicit` (dotted name -> value). SIGTERM and Ctrl-C end
    it after the step, with a checkpoint. `sampler` writes a sample continuation at every evaluation. `source` is a run
    whose newest checkpoint a new run begins with (dsjax.train.phase), or, if `weights_alone`, with its weights.
    `profile` is the first and the last step of a trace for XProf; `began` when this program did, in seconds, for the
    ledger of time. `ready(config, make)` puts what the run reads into its folder, if `make`, and returns the
    configuration complete.

    Raises ConfigError for what the user can mend: settings, data, a mesh that the devices do not make, a run folder of
    another run or in use, a checkpoint that cannot be read or written, or max_skipped_steps steps with NaN or Inf in a
    row.
    """
    run_folder, began = Path(run_folder), time.time() if began is None else began
    processes.start(config.distributed)
    devices()
    report = Report(quiet)
    signals = Signals()

    def prepare(make: bool) -> tuple[Config, Any, Corpus]:
        begun = phase.begin(config, run_folder, source and Path(source), explicit or {}, weights_alone)
        begun = begun if ready is None else ready(begun, make)
        adopted = adopt(begun, run_folder, explicit or {}, report.say)
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
            journal = Journal(run_folder, report)
            checkpoints = Checkpoints(
                run_folder,
                config.keep_checkpoints,
                keep_every=config.keep_every,
                keep_best=config.keep_best,
                tell=lambda step, text: journal.tell(step, "checkpoint", text),
            )
            with jax.set_mesh(mesh), contextlib.closing(journal), checkpoints, processes.together():
                run = Run(config, run_folder, mesh, corpus, checkpoints, journal, report, signals, sampler)
                return run.go(began, profile)
    except Stopped as stop:
        report.say(f"{stop}: ended before a step was taken; `dsjax train {run_folder}` starts again")
        return {}


class Journal:
    """The ledger of wall time, and what happened: told to a person, and kept."""

    def __init__(self, run_folder: Path, report: Report):
        first = jax.process_index() == 0
        self.report, self.goodput, self.incidents = report, Goodput(run_folder, first), Incidents(run_folder, first)

    def tell(self, step: int, kind: str, text: str) -> None:
        self.report.say(text)
        self.incidents.add(step, kind, text)

    def close(self) -> None:
        self.goodput.lines.close()
        self.incidents.close()


class Run:
    """One call of `train`, past the reading of settings and data."""

    def __init__(self, config, run_folder, mesh, corpus, checkpoints, journal, report, signals, sampler):
        self.config: Config = config
        self.folder: Path = run_folder
        self.mesh = mesh
        self.corpus: Corpus = corpus
        self.checkpoints: Checkpoints = checkpoints
        self.journal: Journal = journal
        self.span = journal.goodput.span
        self.report: Report = report
        self.signals: Signals = signals
        self.sampler: Sampler | None = sampler
        self.schedule = Schedule(config)
        self.heldout = Heldout(corpus, config, mesh)
        self.agreed = processes.Agreement(mesh, NAMES)
        self.share = share_of(mesh.local_devices, mesh, config.batch_size // config.accumulate)
        self.ledger = Ledger(run_folder)
        self.taken = 0  # steps whose metrics were seen
        self.feed: Feed | None = None
        self.rows = train_rows(
            corpus, config.data, config.seq_len, config.seed, lambda text: journal.tell(self.taken, "damaged", text)
        )
        self.check = CorruptionCheck(config, mesh) if config.faults.check_every else None

    def go(self, began: float, profile: tuple[int, int] | None) -> dict[str, Any]:
        """The steps that are left, each evaluation that is due, and where everything is."""
        config, report = self.config, self.report
        first, state = self._start()
        state, self.average = begin(config, state)
        self.recorder = Recorder(self.folder, first, write=jax.process_index() == 0)
        done = self.taken = first
        try:
            self._remember_corpus(first)
            if first >= config.steps:
                report.say(
                    f"{first} of {config.steps} steps are done; --steps=N gives it more, --run=PATH a fresh start"
                )
            self.journal.goodput.start(first, time.time() - began)
            due = self._due(first, config.eval_every) if first else config.data.learn != "text"
            if due and not self._evaluated(first):
                self._evaluate(first, self.average.join(state))
            with Profile(profile, self.folder / "tensorboard") as self.profile:
                done = self._steps(first, state)
            self.recorder.draw(at_once=True)  # with no step left too: a kill may have come before the last picture
        finally:
            report.close()
            self.recorder.close()
            if self.feed is not None:
                self.feed.close()
            self.journal.goodput.interval(self.taken, "end")
        if done < config.steps:
            report.say(f"{self.signals.name}: saved at step {done}; `dsjax train {self.folder}` goes on from there")
        report.table(farewell_rows(config, self.folder, self.checkpoints.latest()))
        last = self.recorder.last("eval")
        return {name: value for name, value in last.items() if name not in ("kind", "time")} if last else {}

    def _start(self) -> tuple[int, TrainState]:
        """The step to begin with and the state before it: of the newest checkpoint that is whole."""
        while (found := self.checkpoints.newest(self._read)) is not None:
            step, (state, notes) = found
            limit = self.ledger.stale_after(notes.get("passed", 0))
            if limit is None or step <= limit:
                break
            del state, found  # a kill came between a rollback's line in the ledger and the rollback
            self.checkpoints.drop_after(limit)
        if found is None:
            self.interval = Interval()
            if (came := phase.origin(self.folder)) is None:
                return 0, jit_init_state(self.config)()
            state = phase.first_state(came, self.config, self.mesh, self.report.say)
            self.checkpoints.save(0, state, self.interval.notes)
            return 0, state
        self.interval = Interval(notes or None)
        if notes:
            self.journal.tell(step, "resume", f"resuming {self.folder} at step {step}")
        else:
            self.report.say(f"starting from the weights in {self.folder}")
        return step, state

    def _read(self, step: int) -> tuple[TrainState, dict[str, Any]]:
        """The state of a checkpoint, and its notes: none of imported weights."""
        like = abstract_state(self.config, self.mesh)
        if not self.checkpoints.weights_alone(step):
            return self.checkpoints.restore(step, like)
        given = self.checkpoints.restore_model(step, like.replace(ema=None))
        start = jax.jit(functools.partial(start_state, config=self.config), donate_argnums=(0, 1))
        return start(given.model, given.router_bias), {}

    def _remember_corpus(self, first: int) -> None:
        """Keeps the facts with the run. Raises ConfigError if they are not those that it began with."""
        facts, run = self.corpus.facts, self.recorder.last("run")
        if run is None:
            layers = layer_names(self.config.model)
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
        config, done = self.config, first
        if first >= config.steps:
            return done
        self.signals.patient = True
        step_fn, pending, compiling = jit_train_step(config), [], True
        self.report.say("compiling the training step ...")
        self.clock, self.clock_step, batch = time.perf_counter(), first, self._open(first)
        while done < config.steps:
            if self.check and done % config.faults.check_every == 0:
                self._check(done, state, batch)
            knobs = self.schedule.at(done)
            self.profile.before(done + 1)
            with self.span("compile") if compiling else contextlib.nullcontext():
                began = time.perf_counter()
                state, metrics = step_fn(state, batch, knobs)
                self.average.add(state)
                pending, done = [*pending, metrics], done + 1
                if compiling:
                    jax.block_until_ready(metrics)
            if compiling:
                self._compiled(first, done, time.perf_counter() - began)
                compiling = False
            self.profile.after(done, metrics)
            stalled, interrupted = None, False
            if done < config.steps:
                try:
                    batch = self._next()
                    interrupted = batch is None
                except Stalled as error:
                    if jax.process_count() > 1:  # the others wait within the next step, and save nothing
                        raise
                    stalled = error
            stop = self.agreed(self.signals.name) or interrupted or stalled
            log, save, evaluate = (
                self._due(done, every) for every in (config.log_every, config.checkpoint_every, config.eval_every)
            )
            if not (
                log or save or evaluate or stop
            ):  # the newest may wait, so that the device never waits for the host
                ready, pending = pending[:-1], pending[-1:]
            else:
                ready, pending = pending, []
            if again := next(filter(None, map(self._take, ready)), None):
                if again == "redo":
                    self.config = replace(self.config, compute=more_room(self.config.compute))
                    step_fn, compiling, done = jit_train_step(self.config), True, self.taken
                else:
                    state = batch = None  # their memory is wanted
                    done, state = self._roll_back()
                batch, pending = self._open(done), []
                continue
            self.checkpoints.settle(wait=False)
            if log:
                self._log(done)
            with self._clock_stands():
                if evaluate or save or stop:
                    with self.span("checkpoint"):
                        whole = self.average.join(state)
                if evaluate and not stop:
                    self._evaluate(done, whole)
                if save or stop:
                    self._save(done, whole)
                whole = None  # the average leaves the devices again
                if stalled:
                    self.checkpoints.wait()
                    raise stalled
                if stop:
                    self.signals.name = stop if isinstance(stop, str) else self.signals.name
                    break
        with self.span("checkpoint"):
            self.checkpoints.expect(done)
        return done

    def _compiled(self, first: int, done: int, seconds: float) -> None:
        self.report.say(f"the first step took {seconds:.0f} s, with its compilation")
        if self.report.bar is None:
            self.report.start_bar(first, self.config.steps)
        self.clock, self.clock_step = time.perf_counter(), done

    def _due(self, done: int, every: int) -> bool:
        return done % every == 0 or done == self.config.steps

    def _open(self, first: int) -> Batch:
        """Begins to read at a step; its batch. Raises Stopped for a signal before that comes."""
        config, self.taken = self.config, first
        if self.feed is not None:
            self.feed.close()
        read = batches(
            Passing(self.rows, self.ledger),
            self.schedule.rows,
            first,
            config.steps,
            micro_batch=self.share.total,
            mine=self.share.rows,
        )
        self.feed = Feed(
            read,
            config.faults,
            tell=lambda text: self.journal.tell(self.taken, "stall", text),
            reading=lambda: self.rows.reading() or f"data.sources={','.join(config.data.sources)}",
            interrupted=lambda: self.signals.name is not None and jax.process_count() == 1,
        )
        if (batch := self._next()) is None:
            raise Stopped(self.signals.name)
        return batch

    def _next(self) -> Batch | None:
        """The next step's batch, on its way to the devices; None if a signal came first."""
        with self.span("input"):
            item = next(self.feed)
            return None if item is None else self._batch(item[1])

    def _save(self, done: int, state: TrainState) -> None:
        row = self.recorder.last("eval")
        score = row["heldout_nats"] if row is not None and row["step"] == done else None
        with self.span("checkpoint"):
            self.checkpoints.save(done, state, self.interval.notes | {"passed": len(self.ledger)}, score)

    def _check(self, done: int, state: TrainState, batch: Batch) -> None:
        """Raises ConfigError if two layouts of the devices disagree about a micro-batch's gradients."""
        with self.span("check"), self._clock_stands():
            differ = self.check(state, batch, self.schedule.at(done).mtp_weight)
        if not differ:
            return
        text = (
            f"step {done + 1}: silent data corruption: the same micro-batch on two layouts of the devices gave other "
            f"gradients of {', '.join(differ[:3])}{f' and {len(differ) - 3} more' if len(differ) > 3 else ''}"
        )
        self.journal.tell(done, "corruption", text)
        if self.config.faults.on_corruption == "stop":
            raise ConfigError(f"{text}; test this machine's devices, and go on with others from a checkpoint you trust")

    def _batch(self, arrays: dict[str, np.ndarray]) -> Batch:
        """[A, B, T] micro-batches; a batch that is still growing is filled up with padding that no step takes."""
        config = self.config
        if not config.data.document_mask:
            arrays = one_document(arrays)
        arrays = {name: a.reshape(-1, len(self.share.rows), *a.shape[1:]) for name, a in arrays.items()}
        more = config.accumulate - len(arrays["tokens"])
        arrays = {name: np.pad(a, ((0, more), *((0, 0),) * (a.ndim - 1))) for name, a in arrays.items()}
        return on_mesh(arrays, self.mesh, self.share)

    def _take(self, metrics: Metrics) -> str | None:
        """Waits for the metrics of the next step to be taken. "redo" if it did nothing, for want of room for its rows,
        "rollback" if it was a spike that asks for one.

        Raises ConfigError if too many steps in a row were skipped.
        """
        metrics, config = jax.device_get(metrics), self.config
        if metrics.overflow and config.compute.on_overflow == "redo":
            self.report.say(
                f"step {self.taken + 1}: {metrics.overflow:,} rows had no room on their experts' devices "
                f"(--compute.expert-buffer={config.compute.expert_buffer:g}); compiling the step again with twice the "
                "room ..."
            )
            return "redo"
        if metrics.spike:
            self._spike(metrics)
            if config.faults.on_spike == "rollback":
                return "rollback"
        self.taken += 1
        self.report.step()
        self.interval.add(metrics)
        if (n := int(metrics.skipped_in_a_row)) >= config.max_skipped_steps:
            with contextlib.suppress(ConfigError):  # of several processes, each would end while the others write
                self.checkpoints.wait()
            kept = self.checkpoints.latest()
            rest = "there is no checkpoint yet" if kept is None else f"checkpoint {kept} is intact"
            what = "spikes" if metrics.spike else "NaN or Inf"
            raise ConfigError(
                f"stopped at step {self.taken}: {what} in the loss or gradients of {n} steps in a row (loss "
                f"{float(metrics.loss):g}, gradient norm {float(metrics.grad_norm):g}); {rest}; try an "
                f"--optimizer.peak-lr below {config.optimizer.peak_lr:g}"
            )
        return None

    @functools.cached_property
    def _weights(self) -> list[str]:
        return names(abstract_state(self.config, self.mesh).model)

    def _spike(self, metrics: Metrics) -> None:
        """Tells of a spike in the step to be taken, and keeps what is known of it."""
        step, action = self.taken, self.config.faults.on_spike
        loss, norm = metrics.medians.tolist()
        rows = [self.ledger.row(row) for row in range(*self.schedule.rows(step))]
        facts = {
            "step": step + 1,
            "on_spike": action,
            "loss": float(metrics.loss),
            "median_loss": loss,
            "grad_norm": float(metrics.grad_norm),
            "median_grad_norm": norm,
            "learning_rate": self.schedule.at(step).learning_rate,
            "rows": rows,
            "documents": [self.rows.documents_of(row) for row in rows],
            "max_vio": metrics.max_vio.tolist(),
            "load": np.concatenate([metrics.load.moe, metrics.load.mtp]).astype(int).tolist(),
            "grad_norm_of": dict(zip(self._weights, metrics.leaf_norms.tolist())),
        }
        where = ""
        if jax.process_index() == 0:
            with no_room():
                where = f" ({dump(self.folder, step + 1, facts)})"
        done = {"note": "taken", "skip": "left out", "rollback": "going back before it"}[action]
        self.journal.tell(
            step + 1,
            "spike",
            f"step {step + 1}: a spike, {done}: loss {facts['loss']:.4g} (median {loss:.4g}), gradient norm "
            f"{facts['grad_norm']:.4g} (median {norm:.4g}){where}",
        )

    def _roll_back(self) -> tuple[int, TrainState]:
        """Passes over the documents of the spike in the step to be taken, and of the steps before it; the step to go on
        from, and the state before it.

        Raises ConfigError after faults.max_rollbacks of them.
        """
        faults, spike = self.config.faults, self.taken
        if len(self.ledger) >= faults.max_rollbacks:
            raise ConfigError(
                f"stopped at step {spike + 1}: a spike after {len(self.ledger)} rollbacks (faults.max_rollbacks); "
                f"{self.folder / 'spikes'} tells of each; try an --optimizer.peak-lr below "
                f"{self.config.optimizer.peak_lr:g}"
            )
        with self.span("rollback"):
            back = max(0, spike - faults.rollback_steps)
            first, last = self.schedule.first_row(back), self.schedule.first_row(spike + 1) - 1
            rows = [self.ledger.row(first), self.ledger.row(last) + 1]
            entry = {"step": spike + 1, "from_step": back, "rows": rows, "time": round(time.time(), 3)}
            self.ledger.add(entry, write=jax.process_index() == 0)
            self.checkpoints.drop_after(back)
            step, state = self._start()
            state, self.average = begin(self.config, state)
            self.recorder.rewind(step)
            self._remember_corpus(step)
            self.report.rewind(step)
        self.journal.tell(
            step,
            "rollback",
            f"back to step {step}; rows {rows[0]:,} to {rows[1] - 1:,} of the data, those of steps {back + 1} to "
            f"{spike + 1}, are passed over ({self.ledger.path})",
        )
        self.clock, self.clock_step = time.perf_counter(), step
        return step, state

    def _log(self, done: int) -> None:
        now, knobs = time.perf_counter(), self.schedule.at(done - 1)
        steps, seconds = done - self.clock_step, now - self.clock
        spent = self.journal.goodput.interval(done)
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
                "input_s": spent.get("input", 0.0) / steps if steps else None,
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
        with self.span("eval"):
            self.report.evaluation(self.recorder.write("eval", step, self.heldout(state)))
            if self.sampler and self.mesh.size == 1:
                self._sample(step, state)
            self.recorder.draw()

    def _sample(self, step: int, state: TrainState) -> None:
        """A continuation of the first held-out document, or the first answer of a conversation, if the model's context
        has room for one."""
        tokenizer, documents = self.corpus.tokenizer, self.corpus.heldout
        if documents.learned is None:
            prompt = shown = tokenizer.decode(documents[0][:PROMPT_TOKENS]).rstrip("\ufffd")
            length = 1 + len(tokenizer.encode(prompt))
        else:
            length = int(documents.learned_of(0)[1:].argmax()) + 1
            prompt = documents[0][:length].tolist()
            shown = tokenizer.decode(prompt)
        room = self.config.model.max_position_embeddings - length
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
        self.report.sample(step, shown, "".join(pieces))


def layer_names(m: ModelConfig) -> list[str]:
    """Of the layers with experts."""
    layers = [f"layer {k}" for k in range(m.first_k_dense_replace + 1, m.num_hidden_layers + 1)]
    return layers + [f"MTP {k + 1}" for k in range(m.num_nextn_predict_layers)]


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
