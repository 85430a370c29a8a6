"""Policy optimisation from rewards: sample groups of answers from the weights as they are, judge them, take a step.

    train(config, Path("runs/mine-grpo"), source=Path("runs/mine"))

The folder is a run folder like that of pre-training, which it can be generated from, served and reported on; samples/
holds answers to held-out problems as text. A run that was ended goes on with the same answers and rewards.
"""

import contextlib
import functools
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.config import Config, ConfigError, EngineConfig, GrpoConfig, field_rows, more_room, replace, show
from dsjax.data.tokenizer import Tokenizer
from dsjax.files import write_text
from dsjax.hub.chat import TEMPLATE, ChatTemplate
from dsjax.hub.load import Loaded
from dsjax.infer.engine import Engine
from dsjax.infer.requests import Request
from dsjax.posttrain import rows, telling
from dsjax.posttrain.evaluate import RIGHT, is_right, pass_at, powers
from dsjax.posttrain.exact import ExactEngine
from dsjax.posttrain.policy import Programs, objective_of
from dsjax.posttrain.rollouts import Group, Rollouts, judged
from dsjax.posttrain.tasks import Task, begun, encode, open_task, total
from dsjax.state import PolicyState, Rollout
from dsjax.train import phase
from dsjax.train.checkpoint import Checkpoints, abstract_state, newest_step
from dsjax.train.folder import adopt, owned, run_tokenizer
from dsjax.train.layout import device_mesh, devices
from dsjax.train.loop import Journal, layer_names, machine
from dsjax.train.metrics import Recorder
from dsjax.train.report import Report
from dsjax.train.schedule import Schedule
from dsjax.train.signals import Signals, Stopped
from dsjax.train.step import start_state

# Fields that change nothing, and where.
_UNUSED = {
    "keep_best": "dsjax grpo",
    "batch_size_start": "dsjax grpo",
    "batch_ramp_tokens": "dsjax grpo",
    "faults.on_spike": "dsjax grpo",
    "faults.check_every": "dsjax grpo",
    "grpo.max_rows": "the exact mode",
}


def train(
    config: Config,
    run_folder: Path | str,
    *,
    source: Path | str | None = None,
    explicit: dict[str, Any] | None = None,
    quiet: bool = False,
    task: Task | None = None,
) -> dict[str, Any]:
    """Trains, or goes on with the run that the folder holds; returns the last numbers of an evaluation.

    source: the run whose newest checkpoint a new one begins with. task: instead of the one that config.grpo.task names.
    SIGTERM and Ctrl-C end it after the round, with a checkpoint. Raises ConfigError for what the user can mend.
    """
    run_folder, report, signals, started = Path(run_folder), Report(quiet), Signals(), time.time()
    devices()
    if jax.process_count() > 1:
        raise ConfigError(f"grpo: expected one process, there are {jax.process_count()}")
    try:
        with signals, owned(run_folder), contextlib.ExitStack() as open_:
            config = phase.begin(config, run_folder, source and Path(source), explicit or {})
            first = newest_step(run_folder) or 0
            config = adopt(config, run_folder, explicit or {}, report.say, lambda merged: check(merged, first))
            _take_template(run_folder)
            mesh = device_mesh(config)
            tokenizer = run_tokenizer(run_folder)
            if task is None:
                weights = config.grpo.rewards or None
                task = open_.enter_context(open_task(config.grpo.task, weights=weights, seed=config.seed))
            journal = Journal(run_folder, report)
            checkpoints = Checkpoints(
                run_folder,
                config.keep_checkpoints,
                keep_every=config.keep_every,
                tell=lambda step, text: journal.tell(step, "checkpoint", text),
            )
            with jax.set_mesh(mesh), contextlib.closing(journal), checkpoints:
                return Run(config, run_folder, mesh, tokenizer, task, checkpoints, journal, report, signals).go(started)
    except Stopped as stop:
        report.say(f"{stop}: ended before a step was taken; the same command starts again")
        return {}


def check(config: Config, first: int = 0) -> None:
    """Raises ConfigError for what cannot be, from the step `first` on."""
    grpo = config.grpo
    if grpo is None:
        raise ConfigError("grpo: expected a configuration with this section; `dsjax grpo` makes one")
    if grpo.max_tokens >= config.seq_len:
        raise ConfigError(f"grpo.max_tokens={grpo.max_tokens}: expected less than seq_len={config.seq_len}")
    if (left := config.steps - first) > 0 and left % grpo.updates:
        since = f" less the {first} that are done" if first else ""
        raise ConfigError(f"grpo.updates={grpo.updates}: expected a divisor of steps={config.steps}{since}")
    if grpo.eval_samples > 1 and not grpo.eval_temperature:
        raise ConfigError(
            f"grpo.eval_samples={grpo.eval_samples}: expected 1 with grpo.eval_temperature=0, which gives one answer"
        )
    if config.optimizer.ema_decay and config.optimizer.ema_on == "host":
        raise ConfigError("optimizer.ema_on=host: expected device, or optimizer.ema_decay=none")
    if grpo.exact and grpo.replay and (grpo.updates > 1 or grpo.max_staleness):
        raise ConfigError(
            "grpo.replay=true: expected false with grpo.exact=true and several updates or staleness: it records no "
            "experts, and only the weights that sampled choose the same again"
        )
    usual = Config(grpo=GrpoConfig())
    given, usual = ({name: value for name, value, _ in field_rows(c)} for c in (config, usual))
    for name, where in _UNUSED.items():
        if given[name] != usual[name] and (where == "dsjax grpo" or grpo.exact):
            raise ConfigError(f"{name}={show(given[name])}: has no effect in {where}; expected {show(usual[name])}")


def _take_template(run_folder: Path) -> None:
    """Puts the chat template of the run that it begins with into the folder, if there is one."""
    came = phase.origin(run_folder)
    if came is not None and (Path(came.run) / TEMPLATE).is_file() and not (run_folder / TEMPLATE).exists():
        shutil.copyfile(Path(came.run) / TEMPLATE, run_folder / TEMPLATE)


class Run:
    """One call of `train`, past the reading of settings."""

    def __init__(self, config, run_folder, mesh, tokenizer, task, checkpoints, journal, report, signals):
        self.config: Config = config
        self.folder: Path = run_folder
        self.mesh, self.task = mesh, task
        self.tokenizer: Tokenizer = tokenizer
        self.checkpoints: Checkpoints = checkpoints
        self.journal: Journal = journal
        self.report: Report = report
        self.signals: Signals = signals
        self.schedule, self.programs = Schedule(config), Programs(config)
        self.objective = objective_of(config.grpo)
        self.temperature = jnp.float32(config.grpo.temperature)

    def go(self, started: float) -> dict[str, Any]:
        """started: when this program did, in seconds, for the ledger of time."""
        config, report = self.config, self.report
        self.problems = self.task.heldout()
        n_heldout = len(self.problems)
        report.table(telling.plan_rows(config, self.task, self.objective, self.mesh, n_heldout))
        self.problems = self.problems[: config.grpo.eval_prompts]
        first, state, kept = self._start()
        check(config, first)  # the newest checkpoint may have been damaged
        engine = self._engine(state)
        n_groups = config.batch_size // config.grpo.group_size * config.grpo.updates
        begun_by = functools.partial(begun, template=self._template, style=config.grpo.style)
        options = config.grpo, config.seed, n_groups, kept.get("rollouts")
        self.rollouts = Rollouts(engine, self.task, self._encode, begun_by, self.tokenizer, *options)
        self.recorder, done = Recorder(self.folder, first), first
        if self.recorder.last("run") is None:
            title = f"{config.name}, {self.task.name}, {config.grpo.objective}"
            weights = {name: float(weight) for name, weight in self.task.weights.items()}
            facts = {"task": self.task.name, "style": config.grpo.style, "reward": weights, "held_out": n_heldout}
            self.recorder.write(
                "run", first, {"title": title, "layers": layer_names(config.model), "facts": facts, **machine()}
            )
        try:
            if first >= config.steps:
                report.say(
                    f"{first} of {config.steps} steps are done; --steps=N gives it more, --run=PATH a fresh start"
                )
            self.journal.goodput.start(first, time.time() - started)
            if first == 0:
                self._evaluate(0, engine, state)
            self.signals.patient = True
            while done < config.steps and not self.signals.name:
                state, said = self._round(done, state)
                done = int(state.step)
                if self._due(done, config.log_every):
                    self._log(done, said)
                if self._due(done, config.eval_every):
                    self._evaluate(done, engine, state)
                if self._due(done, config.checkpoint_every) or self.signals.name:
                    with self.journal.goodput.span("checkpoint"):
                        self.checkpoints.save(done, state, {"rollouts": self.rollouts.state})
            if done:
                self.checkpoints.expect(done)
            self.recorder.draw(at_once=True)
        finally:
            self.rollouts.close()
            self.recorder.close()
            report.close()
            self.journal.goodput.interval(done, "end")
        if done < config.steps:
            report.say(f"{self.signals.name}: saved at step {done}; the same command goes on from there")
        report.table(telling.farewell_rows(config, self.folder, self.checkpoints.latest()))
        last = self.recorder.last("eval") or {}
        return {name: value for name, value in last.items() if name not in ("kind", "time")}

    def _start(self) -> tuple[int, PolicyState, dict[str, Any]]:
        """The step to begin with, the state before it, and what the checkpoint says besides."""
        like = self._abstract()

        def read(step: int):
            if self.checkpoints.weights_alone(step):
                return None
            return self.checkpoints.restore(step, like)

        if (found := self.checkpoints.newest(read)) is not None and found[1] is not None:
            step, (state, notes) = found
            self.journal.tell(step, "resume", f"resuming {self.folder} at step {step}")
            return step, state, notes
        came = phase.origin(self.folder)
        source, step = (self.folder, 0) if came is None else (Path(came.run), came.step)
        if found is None and came is None:
            raise ConfigError(f"{self.folder}: no weights to begin with; expected a run to begin from")
        self.report.say(f"starting from step {step} of {source}")
        with Checkpoints(source, read_only=True) as checkpoints:
            given = checkpoints.restore_model(step, abstract_state(self.config, self.mesh).replace(ema=None))
        return 0, jax.jit(self._first, donate_argnums=(0, 1))(given.model, given.router_bias), {}

    def _first(self, model, router_bias) -> PolicyState:
        state = start_state(model, router_bias, self.config)
        reference = self.objective.kl_weight > 0
        copy = _copy if reference else (lambda tree: None)
        return PolicyState(**vars(state), reference=copy(model), reference_bias=copy(router_bias))

    def _abstract(self) -> PolicyState:
        state = abstract_state(self.config, self.mesh)
        reference = (state.model, state.router_bias) if self.objective.kl_weight > 0 else (None, None)
        return PolicyState(**vars(state), reference=reference[0], reference_bias=reference[1])

    def _engine(self, state: PolicyState) -> Engine | ExactEngine:
        config, grpo = self.config, self.config.grpo
        if grpo.exact:
            return ExactEngine(state.model, state.router_bias, self.mesh, config)
        options = EngineConfig(
            max_rows=min(grpo.max_rows, config.batch_size * grpo.updates * (1 + grpo.max_staleness)),
            max_model_len=config.seq_len,
            prefill_rows=min(32, grpo.max_rows),
            n_draft=0,  # whether drafts are used depends on the time they take, and bits would
        )
        return Engine(Loaded(state.model, state.router_bias, self.mesh, config, self.folder), options)

    def _encode(self, problem) -> list[int]:
        tokens = encode(problem, self.tokenizer, self._template, self.config.grpo.style)
        if len(tokens) + self.config.grpo.max_tokens > self.config.seq_len:
            raise ConfigError(
                f"seq_len={self.config.seq_len}: a prompt of {len(tokens)} tokens and an answer of "
                f"grpo.max_tokens={self.config.grpo.max_tokens} do not fit; expected "
                f"--seq-len={len(tokens) + self.config.grpo.max_tokens} or more, or shorter prompts"
            )
        return tokens

    @functools.cached_property
    def _template(self) -> ChatTemplate | None:
        return ChatTemplate.load(self.folder) if self.config.grpo.style == "chat" else None

    def _due(self, done: int, every: int) -> bool:
        """Whether the round that ended at this step passed a multiple, or is the last."""
        return done // every > (done - self.config.grpo.updates) // every or done >= self.config.steps

    # A round: answers, and the steps that they are learned from in

    def _round(self, done: int, state: PolicyState) -> tuple[PolicyState, dict[str, Any]]:
        """Samples, judges and learns; the numbers of the last step, and of all answers."""
        config, grpo, began = self.config, self.config.grpo, time.perf_counter()
        if state.reference is not None and done and done % grpo.reference_every < grpo.updates:
            state = state.replace(reference=_copy(state.model), reference_bias=_copy(state.router_bias))
        groups, replaced = self._groups(done, state)
        sampled = time.perf_counter()
        numbers = self._measure(groups) | {"resampled": replaced}
        per_step, apart = config.batch_size // grpo.group_size, {}
        shares = [groups[i : i + per_step] for i in range(0, len(groups), per_step)]
        ask = grpo.old_policy == "trainer"  # before the first of the steps
        olds = [self._old(done, share, state) if ask else None for share in shares]
        for update, (share, old) in enumerate(zip(shares, olds)):
            state, said = self._learn(done, done + update, share, state, old)
            # In later steps the weights are not the sampler's.
            apart = apart or {name: said[name] for name in ("gap", "gap_max")}
        seconds = {"sample_s": sampled - began, "learn_s": time.perf_counter() - sampled}
        return state, {**numbers, **said, **apart, **seconds}

    def _groups(self, done: int, state: PolicyState) -> tuple[list[Group], int]:
        """The round's groups; of those without spread, as many as may be are replaced by new ones."""
        with self.journal.goodput.span("sample"):
            groups = self.rollouts.collect(done, state.model, state.router_bias)
            replaced = 0
            for _ in range(self.config.grpo.resample):
                flat = [i for i, group in enumerate(groups) if not np.ptp(self._worth(group))]
                if not flat:
                    break
                for i, group in zip(flat, self.rollouts.more(len(flat))):
                    groups[i], replaced = group, replaced + 1
            for group in groups:
                group.parts.result()
        return groups, replaced

    def _worth(self, group: Group) -> np.ndarray:
        """Of each answer what its advantage is made of."""
        return rows.paid(group, group.rewards(self.task.weights), self.config.grpo)

    def _micros(self, version: int, groups: list[Group]) -> Iterator[Rollout]:
        advantage = rows.group_advantages(np.stack([self._worth(group) for group in groups]), self.config.grpo)
        for arrays in rows.rollouts(groups, advantage, version, self.config):
            yield rows.on_mesh(arrays, self.mesh)

    def _old(self, version: int, groups: list[Group], state: PolicyState) -> list[np.ndarray]:
        """Of every micro-batch the log-probabilities under these weights."""
        micros = self._micros(version, groups)
        return [np.asarray(self._score(state.model, state.router_bias, m, m.experts)) for m in micros]

    def _learn(self, version: int, step: int, groups: list[Group], state: PolicyState, old: list[np.ndarray] | None):
        """One step from groups that were sampled at step `version`; old: as `_old`, the sampler's own if None."""
        config, programs, micros = self.config, self.programs, list(self._micros(version, groups))
        if state.reference is not None:
            micros = [m.replace(reference=self._score(state.reference, state.reference_bias, m, None)) for m in micros]
        if old is not None:
            micros = [m.replace(old=jax.device_put(a, m.sampler.sharding)) for m, a in zip(micros, old)]
        depth = config.model.num_nextn_predict_layers
        counts = jax.tree.map(lambda *n: sum(n), *(programs.count(m, depth) for m in micros))
        knobs = {name: jnp.asarray(value, jnp.float32) for name, value in vars(self.schedule.at(step)).items()}
        if config.grpo.router_bias == "frozen":
            knobs["bias_update_speed"] = jnp.float32(0)
        total, apart = None, []
        for m in micros:
            *more, logp = programs.gradients(state.model, state.router_bias, m, counts, knobs["mtp_weight"])
            total = more if total is None else programs.add(total, more)
            apart.append(np.abs(np.asarray(logp) - np.asarray(m.sampler))[np.asarray(m.fresh)])
        grads, parts = total
        apart = np.concatenate(apart)
        state, said = programs.apply(state, grads, parts, knobs)
        parts, said = jax.device_get((parts, said))
        if parts.overflow and config.compute.on_overflow == "redo":
            self.report.say(
                f"step {step + 1}: {parts.overflow:,} rows had no room on their experts' devices; again ..."
            )
            self.config = replace(config, compute=more_room(config.compute))
            self.programs = Programs(self.config)
            return self._learn(version, step, groups, state, old)
        if said["skipped_in_a_row"] >= config.max_skipped_steps:
            raise ConfigError(
                f"stopped at step {step + 1}: NaN or Inf in the loss or gradients of {said['skipped_in_a_row']} steps "
                f"in a row; try an --optimizer.peak-lr below {config.optimizer.peak_lr:g}"
            )
        n_tokens = max(1, sum(int(jnp.sum(m.mask)) for m in micros))
        return state, {
            "loss": float(parts.loss),
            "mtp_loss": parts.mtp_loss.tolist(),
            "balance_loss": float(parts.balance),
            "grad_norm": float(said["grad_norm"]),
            "max_vio": said["max_vio"].tolist(),
            "max_vio_mean": float(np.mean(said["max_vio"])) if said["max_vio"].size else 0.0,
            "load": np.concatenate([parts.load.moe, parts.load.mtp]).astype(int).tolist(),
            "overflow": int(parts.overflow),
            "skipped": int(said["skipped"]),
            "learning_rate": float(knobs["learning_rate"]),
            "mtp_weight": float(knobs["mtp_weight"]),
            "bias_update_speed": float(knobs["bias_update_speed"]),
            "entropy": float(parts.entropy) / n_tokens,
            "kl": None if state.reference is None else float(parts.kl) / n_tokens,
            "clipped": float(parts.clipped) / n_tokens,
            "left_out": float(parts.left_out) / n_tokens,
            "gap": float(apart.mean()) if apart.size else None,  # all may have been sampled by older weights
            "gap_max": float(apart.max()) if apart.size else None,
        }

    def _score(self, model, router_bias, micro: Rollout, experts):
        return self.programs.score(model, router_bias, micro.batch, self.temperature, experts)

    # What a person sees

    def _measure(self, groups: list[Group]) -> dict[str, Any]:
        """Of all answers of a round."""
        weights = self.task.weights
        rewards = np.stack([group.rewards(weights) for group in groups])
        worth = np.stack([self._worth(group) for group in groups])
        parts = [parts for group in groups for parts in group.parts.result()]
        answers = [answer for group in groups for answer in group.answers]
        lengths = [len(answer.tokens) for answer in answers]
        ages = [self.rollouts.version - v for answer in answers for v in answer.versions]
        return {
            "reward": float(rewards.mean()),
            **{f"reward_{name}": _mean_of(parts, name) for name in weights},
            "length": float(np.mean(lengths)),
            "length_max": max(lengths),
            "truncated": float(np.mean([answer.reason == "length" for answer in answers])),
            "zero_spread": float(np.mean(np.ptp(worth, axis=1) == 0)),
            "staleness": float(np.mean(ages)),
            "answer_tokens": sum(lengths),
        }

    def _log(self, done: int, said: dict[str, Any]) -> None:
        spent = self.journal.goodput.interval(done)
        row = self.recorder.write("train", done, {**said, "seconds": spent})
        self.report.say(telling.step_line(row, self.config.steps, self.task.weights))

    def _evaluate(self, done: int, engine: Engine, state: PolicyState) -> None:
        """pass@1 to pass@k on held-out problems, and some of the answers as text."""
        grpo, problems, weights = self.config.grpo, self.problems, self.task.weights
        if not problems:
            return
        with self.journal.goodput.span("eval"):
            engine.renew(state.model, state.router_bias)
            texts, lengths, n_cut = self._answers(engine, problems)
            flat = [text for of_one in texts for text in of_one]
            parts = judged(self.task, [problem for problem in problems for _ in range(grpo.eval_samples)], flat)
            row = {
                **_passed(parts, grpo.eval_samples),
                "heldout_reward": float(np.mean([total(p, weights) for p in parts])),
                **{f"heldout_{name}": _mean_of(parts, name) for name in weights},
                "heldout_length": float(np.mean(lengths)),
                "heldout_truncated": n_cut / len(flat),
            }
            row = self.recorder.write("eval", done, row)
            (self.folder / "samples").mkdir(exist_ok=True)
            text = telling.samples_text(problems, texts, parts)
            write_text(self.folder / "samples" / f"step-{done:06}.txt", text)
            self.recorder.draw()
        self.report.say(telling.evaluation_line(row, problems[0], texts[0][0]))

    def _answers(self, engine: Engine, problems) -> tuple[list[list[str]], list[int], int]:
        """Texts of every problem, lengths of all, and how many were cut off."""
        grpo, tokens, reasons = self.config.grpo, [], []
        for n, problem in enumerate(problems):
            for k in range(grpo.eval_samples):
                said: list[int] = []
                tokens.append(said)
                request = Request(
                    self._encode(problem),
                    max_tokens=grpo.max_tokens,
                    temperature=grpo.eval_temperature,
                    seed=n * grpo.eval_samples + k,
                    stop_ids=tuple(self.tokenizer.eos_ids),
                    tell=lambda new, said=said: said.extend(one.token for one in new) or None,
                    done=reasons.append,
                )
                engine.submit(request)
        engine.run()
        texts = list(map(self.rollouts.text, tokens))
        k = grpo.eval_samples
        texts = [begun(problems[i // k], self._template, grpo.style) + text for i, text in enumerate(texts)]
        return [texts[i : i + k] for i in range(0, len(texts), k)], list(map(len, tokens)), reasons.count("length")


@jax.jit
def _copy(tree):
    return jax.tree.map(jnp.copy, tree)


def _passed(parts: list[dict[str, float]], n_samples: int) -> dict[str, float]:
    """pass@1 to pass@n_samples; nothing where no reward says whether an answer is right."""
    if not all(set(p) & set(RIGHT) for p in parts):
        return {}
    solved = np.array([is_right(p) for p in parts]).reshape(-1, n_samples).sum(axis=1)
    return {f"pass_{k}": float(np.mean([pass_at(k, n_samples, int(n)) for n in solved])) for k in powers(n_samples)}


def _mean_of(parts: list[dict[str, float]], name: str) -> float:
    """Of a reward, over the answers that it is of; 0 where there are none."""
    return float(np.mean([p[name] for p in parts if name in p] or [0.0]))
