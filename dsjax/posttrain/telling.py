"""What a person sees of policy optimisation: facts first, a line a step, samples as text, commands at the end."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from dsjax.config import Config, GrpoConfig
from dsjax.plan import count
from dsjax.plan.count import human
from dsjax.posttrain.objective import Objective
from dsjax.posttrain.problem import Problem
from dsjax.posttrain.tasks import Task
from sharding.mesh import show_axes

SHOWN = 4  # problems of an evaluation whose answers are kept as text
_NORMALISERS = {
    "sequence": "answers count alike",
    "token": "tokens count alike",
    "constant": "tokens count 1 / longest",
}


def plan_rows(config: Config, task: Task, objective: Objective, mesh, n_heldout: int) -> list[tuple[str, str]]:
    """What is trained, on what, and what is maximised."""
    n, grpo, axes = count.parameters(config.model), config.grpo, show_axes(mesh.shape)
    mtp = f"; {human(n.mtp)} more for MTP" if n.mtp else ""
    n_asked = min(n_heldout, grpo.eval_prompts)
    held = f"{n_heldout:,} problems held out"
    held += f", {n_asked} of them asked {_times(grpo.eval_samples)}" if n_asked else ""
    updates = f", {grpo.updates} steps from what is sampled at once" if grpo.updates > 1 else ""
    return [
        ("model", f"{human(n.total)} parameters, of which a token uses {human(n.active_body_head)}{mtp}"),
        ("task", f"{task.name}, put as {grpo.style}; {held}"),
        ("reward", ", ".join(f"{name} {weight:g}" for name, weight in task.weights.items())),
        (
            "steps",
            f"{config.steps:,} of {config.batch_size // grpo.group_size} prompts x {grpo.group_size} answers of at "
            f"most {grpo.max_tokens:,} tokens{updates}",
        ),
        ("objective", f"{grpo.objective}: {_words(objective, grpo)}"),
        ("sampling", _sampling(config)),
        (
            "devices",
            f"{mesh.size} {jax.devices()[0].device_kind} device{'s' * (mesh.size > 1)}"
            + (f", mesh {axes}" if axes else ""),
        ),
    ]


def _words(o: Objective, grpo: GrpoConfig) -> str:
    ratio = "of tokens" if o.ratio == "token" else "of whole answers"
    parts = [f"ratios {ratio} from {max(0.0, 1 - o.clip_low):g} to {1 + o.clip_high:g}"]
    if o.kl_weight:
        parts.append(f"KL {o.kl_weight:g} ({o.kl}) to a policy renewed every {_n(grpo.reference_every, 'step')}")
    parts.append(f"advantages {'over' if o.scale else 'not over'} the standard deviation")
    parts.append(_NORMALISERS[o.normalise])
    if o.off_policy is not None:
        parts.append(f"bad answers more than {o.off_policy:g} nats a token away left out")
    if o.most_weight is not None and grpo.old_policy == "trainer":
        parts.append(f"importance weights up to {o.most_weight:g}")
    return ", ".join(parts)


def _sampling(config: Config) -> str:
    grpo = config.grpo
    parts = [f"temperature {grpo.temperature:g}"]
    if grpo.exact:
        parts.append("by the training forward pass, bit for bit")
    elif config.model.num_moe_layers:
        parts.append("its experts replayed in training" if grpo.replay else "training chooses its own experts")
    if config.model.topk_method == "noaux_tc":
        parts.append("router bias at rest" if grpo.router_bias == "frozen" else "router bias follows the load")
    if grpo.max_staleness:
        parts.append(f"begun up to {_n(grpo.max_staleness, 'round')} before")
    if grpo.resample:
        parts.append(f"groups without spread replaced up to {_times(grpo.resample)}")
    if grpo.overlong != "keep":
        parts.append(f"cut-off answers: {grpo.overlong}")
    return ", ".join(parts)


def farewell_rows(config: Config, run_folder: Path, step: int | None) -> list[tuple[str, str]]:
    """Where everything is, and the commands to go on with."""
    folder = shlex.quote(str(run_folder))
    if step is None:
        return []
    grpo, samples = config.grpo, max((run_folder / "samples").glob("step-*.txt"), default=None)
    heldout = " --heldout" if Path(grpo.task).is_file() else ""
    rewards = f" --rewards {shlex.quote(grpo.rewards)}" if grpo.rewards else ""
    asked = f"--task {shlex.quote(grpo.task)}{rewards} --style {grpo.style} --max-tokens {grpo.max_tokens}"
    kept = [("samples", str(samples))] if samples else []
    return [
        ("checkpoint", f"{run_folder / 'checkpoints' / str(step)}"),
        ("pictures", f"{run_folder / 'loss.png'}, or tensorboard --logdir {folder}/tensorboard"),
        *kept,
        ("page", f"dsjax report {folder}"),
        ("evaluate", f"dsjax eval {folder} {asked}{heldout}"),
    ]


def step_line(row: dict[str, Any], steps: int, weights) -> str:
    """The numbers of a step."""
    parts = [f"{name} {_number(row[f'reward_{name}'])}" for name in weights]
    inner = f" ({', '.join(parts)})" if len(parts) > 1 else ""
    cut = f", {row['truncated']:.0%} cut off" if row["truncated"] else ""
    skipped = f", {row['skipped']} skipped" if row["skipped"] else ""
    distance = "" if row["kl"] is None else f"KL {row['kl']:.2g}, "
    gap = "" if row["gap"] is None else f"sampler and trainer {row['gap']:.1e} apart (most {row['gap_max']:.1e}), "
    return (
        f"step {row['step']}/{steps}: reward {_number(row['reward'])}{inner}, {row['length']:.1f} tokens{cut}, "
        f"entropy {_number(row['entropy'])}, {distance}{row['zero_spread']:.0%} of groups without spread, {gap}"
        f"{row['sample_s']:.1f} s sampling and {row['learn_s']:.1f} s learning{skipped}"
    )


def evaluation_line(row: dict[str, Any], problem: Problem, text: str) -> str:
    """The numbers of an evaluation, and the first answer."""
    passed = [f"pass@{name[5:]} {value:.3f}" for name, value in row.items() if name.startswith("pass_")]
    said = ", ".join([*passed, f"reward {_number(row['heldout_reward'])}", f"{row['heldout_length']:.1f} tokens"])
    return f"step {row['step']}: held out {said}; {problem.prompt!r} -> {text!r}"


def samples_text(problems: Sequence[Problem], texts: list[list[str]], parts: list[dict[str, float]]) -> str:
    """The first problems, what was said to each, and what it was worth."""
    lines, n_samples = [], len(texts[0])
    for n, problem in enumerate(problems[:SHOWN]):
        lines += [f"# problem {n + 1}, expected {problem.answer!r}", str(problem.prompt), ""]
        for k, text in enumerate(texts[n]):
            worth = ", ".join(f"{name} {value:g}" for name, value in parts[n * n_samples + k].items())
            lines += [f"## answer {k + 1}: {worth}", text, ""]
    return "\n".join(lines)


def _number(value: float | None, form: str = ".3f") -> str:
    return "NaN" if value is None else format(value, form)


def _n(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _times(n: int) -> str:
    return {1: "once", 2: "twice"}.get(n, f"{n} times")
