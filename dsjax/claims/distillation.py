"""The claim that a small model learns more from a larger one's answers than from reinforcement learning of its own.

DeepSeek-R1 (arXiv:2501.12948, section 4.1): a small model taught by R1's answers is far better than one of its size
trained by large-scale reinforcement learning, which costs much more. Here the task is the parity of bits
(dsjax.posttrain.parity). The teacher has learned to reason by reinforcement learning (dsjax.claims.r1_zero); the
students are narrower and saw few chains of thought. One copy of each is taught by the teacher's answers, of which the
right ones are kept; another is left to reinforcement learning for as much compute. Every training is a run folder, so
that a claim that was stopped goes on where it was.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsjax.claims import runs
from dsjax.claims.long_context import Clock
from dsjax.claims.r1_zero import N_BITS, base_model, held_out_accuracy, rl_model, write_texts
from dsjax.config import Config, ModelConfig, replace
from dsjax.config import load as load_config
from dsjax.files import read_json, replacing, write_json
from dsjax.hub.load import load
from dsjax.plan.count import train_flops
from dsjax.posttrain.distill import Traces, distill
from dsjax.posttrain.evaluate import Answer
from dsjax.posttrain.parity import Parity
from dsjax.posttrain.traces import answers_of
from dsjax.train import loop
from dsjax.train.lines import read_lines

MARGIN = 0.1  # of accuracy, by which the taught student must be ahead
Say = Callable[[str], None]


@dataclass(frozen=True)
class Sizes:
    """How much of everything: about a quarter of an hour on two cores."""

    base_steps: int = 300  # of pre-training
    chains: float = 0.02  # of the student's documents that have a chain; of the teacher's, a tenth
    teacher_steps: int = 60  # of reinforcement learning
    problems: int = 4000
    samples: int = 1  # answers of the teacher to each: it says the same again
    epochs: float = 3.0  # that the student sees them
    peak_lr: float = 1e-2  # of teaching
    asked: int = 512  # held-out problems


def student_model(seed: int, steps: int) -> Config:
    """The teacher's network at half its width."""
    base = base_model(seed, steps)
    narrow = replace(
        base.model,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        v_head_dim=16,
    )
    return replace(base, name="parity-small", model=narrow)


def test(folder: Path, n_seeds: int, say: Say, sizes: Sizes = Sizes()) -> dict[str, Any]:
    """Trains what is not trained yet; writes claim.json and claim.png into the folder.

    Raises ConfigError if a training was stopped, or is one of other sizes.
    """
    runs.only_of(folder, None, **vars(sizes))
    clock = Clock()
    teacher = reasoner(folder, say, sizes)
    clock("teacher")
    rows = []
    for seed in range(n_seeds):
        student = _pretrained(student_model(seed, sizes.base_steps), folder / f"student-{seed}", sizes.chains, say)
        clock(f"student {seed}")
        taught, cost = _taught(teacher, student, folder / f"taught-{seed}", seed, say, sizes)
        clock(f"taught {seed}")
        alone, spent = _alone(student, folder / f"alone-{seed}", sum(cost.values()), say)
        clock(f"alone {seed}")
        models = {"before": student, "alone": alone, "taught": taught}
        measured = {name: _measured(run, folder / f"{name}-{seed}.json", sizes.asked) for name, run in models.items()}
        clock(f"measured {seed}")
        rows.append({"seed": seed, **measured, "flops": {**cost, "alone": spent}, "curve": learned_by(alone)})
    first = _measured(teacher, folder / "teacher.json", sizes.asked)
    result = compare(rows) | {
        "teacher": first,
        "teacher_flops": rl_flops(teacher),
        "command": f"dsjax claims distillation --seeds={n_seeds} --chains={sizes.chains}",
        "sizes": vars(sizes),
        "seconds": clock.seconds,
        "machine": loop.machine(),
    }
    write_json(folder / "claim.json", result)
    draw(result, folder / "claim.png")
    return result


def compare(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The claim holds if in two seeds of three, or more, the taught student is ahead by the margin."""
    ahead = [row["taught"]["accuracy"] - row["alone"]["accuracy"] for row in rows]
    least = math.ceil(2 * len(rows) / 3)
    return {
        "claim": f"a student that is taught is {100 * MARGIN:.0f} points ahead of one left to reinforcement learning "
        f"for as much compute, in {least} of {len(rows)} seeds",
        "holds": sum(a >= MARGIN for a in ahead) >= least,
        "ahead": ahead,
        "seeds": rows,
    }


def table(result: dict[str, Any]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Head and rows: accuracy on held-out bits, the share of answers with a chain, and FLOPs after pre-training."""
    rows = [_row("teacher", "", result["teacher"], result["teacher_flops"])]
    for row in result["seeds"]:
        flops = row["flops"]
        costs = {"before": 0, "alone": flops["alone"], "taught": flops["traces"] + flops["sft"]}
        rows += [_row(name, str(row["seed"]), row[name], cost) for name, cost in costs.items()]
    return ["student", "seed", "accuracy", "sampled", "chains", "tokens", "FLOPs"], rows


def _row(name: str, seed: str, of: dict[str, Any], flops: float) -> tuple[str, ...]:
    shares = (f"{100 * of[key]:.1f}%" for key in ("accuracy", "sampled_accuracy", "chain_share"))
    return name, seed, *shares, f"{of['mean_length']:.1f}", f"{flops:.2e}"


# Compute: a forward pass is a third of dsjax.plan's count of forward and backward, without MTP.


def forward_flops(model: ModelConfig, tokens: float, length: int) -> float:
    """Of reading or sampling that many tokens in texts of this length."""
    return train_flops(model, length) / 3 * tokens


def teaching_flops(teacher: Config, student: Config, answers: list[Answer], n_bits: int) -> dict[str, float]:
    """Of all answers that the teacher gave, kept or not; and of the student's rows, padding included."""
    prompt = n_bits + 2
    tokens = sum(prompt + answer.n_tokens for answer in answers)
    rows = student.steps * student.batch_size * student.seq_len
    return {
        "traces": forward_flops(teacher.model, tokens, 2 * prompt),
        "sft": 3 * forward_flops(student.model, rows, student.seq_len),
    }


def step_flops(config: Config, answer_tokens: float, n_bits: int) -> float:
    """Of a step of reinforcement learning: all answers sampled, and learned in a forward and a backward pass. The
    reference's forward pass, evaluations and padding are not counted, in favour of reinforcement learning."""
    prompt = n_bits + 2
    return 4 * forward_flops(config.model, config.batch_size * prompt + answer_tokens, 2 * prompt)


def rl_flops(run: Path, n_bits: int = N_BITS) -> float:
    """Of all saved steps of a run of `dsjax grpo`."""
    return sum(_steps_flops(run, n_bits))


def _steps_flops(run: Path, n_bits: int = N_BITS) -> list[float]:
    if not (run / "config.json").is_file():
        return []
    config, rows, done = load_config(run / "config.json"), read_lines(run / "metrics.jsonl"), runs.done(run)
    tokens = [row["answer_tokens"] for row in rows if row["kind"] == "train" and row["step"] <= done]
    return [step_flops(config, n, n_bits) for n in tokens]


def learned_by(run: Path) -> list[tuple[float, float]]:
    """(FLOPs, accuracy of greedy answers) of each evaluation of a run of reinforcement learning."""
    spent = np.concatenate([[0.0], np.cumsum(_steps_flops(run))])
    rows = read_lines(run / "metrics.jsonl")
    return [(float(spent[row["step"]]), row["pass_1"]) for row in rows if row["kind"] == "eval"]


# The trainings.


def reasoner(folder: Path, say: Say, sizes: Sizes) -> Path:
    """The run of a model that reasons: pre-trained with few chains, and then trained by rewards alone."""
    base = _pretrained(base_model(0, sizes.base_steps), folder / "base", None, say)
    return _reinforced(base, folder / "teacher", sizes.teacher_steps, say)


def _pretrained(config: Config, run: Path, chains: float | None, say: Say) -> Path:
    share = {} if chains is None else {"chain_share": chains}
    text = write_texts(run.with_name(f"{run.name}-text"), seed=config.seed, **share)
    config = replace(config, data=replace(config.data, sources=(str(text),)))
    return runs.pretrained(config, run, None, say)


def _reinforced(base: Path, run: Path, steps: int, say: Say) -> Path:
    """The run of policy optimisation from a base, with the settings of `dsjax claims r1_zero`, taken to that step."""
    return runs.reinforced(rl_model(load_config(base / "config.json"), steps), run, base, say)


def _taught(
    teacher: Path, student: Path, run: Path, seed: int, say: Say, sizes: Sizes
) -> tuple[Path, dict[str, float]]:
    """The student after R1's distillation, and its FLOPs."""
    task = Parity(N_BITS, seed=1 + seed)
    distill(
        teacher,
        student,
        task,
        run,
        Traces(samples=sizes.samples, max_tokens=N_BITS + 4, seed=seed),
        n_problems=sizes.problems,
        epochs=sizes.epochs,
        max_rows=256,
        changes={"optimizer.peak_lr": sizes.peak_lr},
        say=say,
        quiet=True,
    )
    config = load_config(run / "student" / "config.json")
    lines = read_lines(answers_of(run / "traces" / "traces.jsonl"))
    answers = [Answer(*(line[name] for name in Answer._fields)) for line in lines if "asked" not in line]
    runs.whole(run / "student", config.steps)
    return run / "student", teaching_flops(load_config(teacher / "config.json"), config, answers, N_BITS)


def _alone(student: Path, run: Path, budget: float, say: Say) -> tuple[Path, float]:
    """The student after reinforcement learning until the budget is spent, and its FLOPs. As answers grow longer, steps
    cost more: their number is guessed, and corrected."""
    config = rl_model(load_config(student / "config.json"), 1)
    while (spent := rl_flops(run)) < budget:
        last = _steps_flops(run)[-5:] or [step_flops(config, config.batch_size * (N_BITS + 2), N_BITS)]
        _reinforced(student, run, runs.done(run) + math.ceil((budget - spent) / np.mean(last)), say)
    return run, spent


def _measured(run: Path, path: Path, n: int) -> dict[str, Any]:
    """Of greedy answers, and the accuracy of sampled ones; kept in a file."""
    if not (found := read_json(path)):
        loaded = load(run)
        sampled = held_out_accuracy(loaded, n, temperature=1.0, seed=1)["accuracy"]
        found = held_out_accuracy(loaded, n) | {"sampled_accuracy": sampled}
        write_json(path, found)
    return found


def draw(result: dict[str, Any], path: Path) -> None:
    """Accuracy by compute, as PNG: reinforcement learning as it goes, and the taught students."""
    import matplotlib
    from matplotlib.figure import Figure

    from dsjax.train.picture import BLUE, GREY, INK, ORANGE, STYLE

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.8), layout="constrained")
        panel = figure.subplots()
        for row in result["seeds"]:
            first = row["seed"] == result["seeds"][0]["seed"]
            cost = row["flops"]["traces"] + row["flops"]["sft"]
            flops, accuracy = zip(*row["curve"])
            panel.plot(flops, accuracy, color=ORANGE, lw=1.6, label="reinforcement learning alone" if first else None)
            start, end = row["before"]["accuracy"], row["taught"]["accuracy"]
            panel.plot([0, cost], [start, end], color=BLUE, lw=1, ls=":")
            panel.plot(cost, end, "o", color=BLUE, ms=8, label="taught by the teacher's answers" if first else None)
        panel.axhline(result["teacher"]["accuracy"], color=INK, lw=1, ls="--", label="the teacher")
        panel.axhline(0.5, color=GREY, lw=1, label="a guess")
        panel.set(
            title=f"Parity of {N_BITS} held-out bits, after pre-training; a line or point a seed",
            xlabel="FLOPs, the teacher's sampling included and its training not",
            ylabel="accuracy of greedy answers",
            ylim=(0.4, 1.02),
            xlim=(0, None),
        )
        panel.legend()
        with replacing(path) as file:
            figure.savefig(file, dpi=110)
