"""Distillation as of DeepSeek-R1: the answers of a teacher, of which the right ones are kept, teach a student.

    with open_task("gym:chain_sum") as task:
        distill("runs/r1", "runs/base", task, "runs/distilled", Traces(samples=4), n_problems=1000)

The run folder holds a folder for each stage: traces/ (traces.jsonl and all answers) and student/, a run like any other
of `dsjax sft`. A stage that is done is not done again, and one that was killed goes on. With logits=K the student
learns the K likeliest tokens of the teacher at every place too (dsjax.posttrain.teacher).
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from dsjax import config as configuration
from dsjax.config import Config, ConfigError, EngineConfig, override, show
from dsjax.data.tokenizer import Tokenizer
from dsjax.files import read_json, write_json, write_text
from dsjax.hub.chat import TEMPLATE
from dsjax.hub.config import is_hub_folder
from dsjax.hub.load import Loaded, load
from dsjax.posttrain.chats import load_template
from dsjax.posttrain.evaluate import Asking
from dsjax.posttrain.problem import Problem
from dsjax.posttrain.sft import sft
from dsjax.posttrain.tasks import Task
from dsjax.posttrain.teacher import check_tokenizer, put_logits
from dsjax.posttrain.traces import distinct, write_traces
from dsjax.train import processes
from dsjax.train.checkpoint import has_checkpoint, imported, newest_step

RECIPE = "distill"


@dataclass(frozen=True)
class Traces:
    """Which answers of the teacher are learned. R1's report says several a problem, of which the right ones."""

    samples: int = 4
    keep: str = "right"
    most: int | None = None  # kept answers a problem
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = Asking.max_tokens
    longest: int | None = None  # tokens of a kept answer
    language: float = 0.0  # least share of words in one language
    style: str = "plain"
    seed: int = 0


def distill(
    teacher: Path | str,
    student: Path | str,
    task: Task,
    run_folder: Path | str,
    traces: Traces = Traces(),
    *,
    n_problems: int = 1000,
    logits: int = 0,
    logits_weight: float = 0.5,
    recipe: str | None = None,
    epochs: float | None = None,
    dtype: str | None = None,
    max_rows: int = EngineConfig.max_rows,
    changes: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = print,
    quiet: bool = False,
    **options,
) -> dict[str, Any]:
    """Asks the teacher, and tunes the student on its answers; the last held-out numbers and the counts of traces.

    teacher, student: run folders or Hub folders. n_problems: the task's first ones to learn from. logits: likeliest
    tokens of the teacher that are learned at every place; logits_weight: of the loss that is to them. recipe, epochs,
    changes, options: as `sft` takes them, the recipe `distill` if not given. dtype, max_rows: of the teacher. Raises
    ConfigError for what the user can mend, as for a folder with other answers.
    """
    teacher, student, run_folder = Path(teacher), Path(student), Path(run_folder)
    changes = {name.replace("-", "_"): value for name, value in (changes or {}).items()}
    here = override(Config(), {name: value for name, value in changes.items() if name.startswith("distributed.")})
    processes.start(here.distributed)
    if jax.process_count() > 1:
        raise ConfigError(
            f"distill: expected one process, there are {jax.process_count()}; `dsjax sft` takes traces to several"
        )
    if logits:
        check_tokenizer(Tokenizer.load(teacher), Tokenizer.load(student), logits)
    _check_student(run_folder / "student", logits)
    once = _Once(teacher, dtype, say, not quiet)
    path, counts = _traces(once, task, run_folder, traces, n_problems, max_rows)
    settings = {"data.teacher_top_k": logits, "data.teacher_weight": logits_weight} if logits else {}

    def teach(config: Config, folder: Path) -> None:
        if logits:
            put_logits(once.loaded, config, folder, progress=not quiet, say=say)
        once.forget()

    return counts | sft(
        student,
        run_folder / "student",
        [str(path)],
        recipe=recipe or RECIPE,
        epochs=epochs,
        template=_template(teacher, student, traces.style, path.parent),
        teach=teach,
        changes=settings | changes,
        quiet=quiet,
        **options,
    )


def _check_student(folder: Path, logits: int) -> None:
    """Raises ConfigError where the student that the folder holds learns another number of the teacher's tokens."""
    if has_checkpoint(folder) and not imported(folder):
        was = configuration.load(folder / "config.json").data.teacher_top_k
        if was != logits:
            raise ConfigError(f"--logits={logits}: the student in {folder} began with {was}; choose another --run")


def _traces(
    once: "_Once", task: Task, run_folder: Path, traces: Traces, n_problems: int, max_rows: int
) -> tuple[Path, dict[str, int]]:
    """The file of traces, and its counts. What they are of stands in traces.json; written last, it says that they are
    whole."""
    folder = run_folder / "traces"
    path, kept = folder / "traces.jsonl", read_json(folder / "traces.json")
    problems = distinct(task, n_problems)
    asked = {"teacher": once.label, "task": task.name, "problems": n_problems, **dataclasses.asdict(traces)}
    asked |= {"rewards": dict(task.weights), "digest": _digest(problems)}
    if kept:
        for name, value in asked.items():
            if kept["asked"].get(name, value) != value:
                raise ConfigError(
                    f"{path}: the traces are of {name}={show(kept['asked'].get(name))}, and now it is {show(value)}; "
                    "choose another --run"
                )
        return path, kept["counts"]
    options = {"max_rows": max_rows, "label": once.label, "progress": once.progress, "say": once.say}
    counts = write_traces(once.loaded, task, problems, path, **dataclasses.asdict(traces), **options)
    said = ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in counts.items() if n)
    once.say(f"{path}: {said}")
    if counts["kept"] < 2:
        raise ConfigError(
            f"{path}: {counts['kept']} of {counts['answers']:,} answers are worth learning; expected two or more: try "
            "more problems or samples with another --run, or --keep all"
        )
    write_json(folder / "traces.json", {"asked": asked, "counts": counts})
    return path, counts


def _digest(problems: list[Problem]) -> str:
    """Of prompts, answers and facts; of what is no JSON among these (a gym's entry), only its type."""
    whole = [(problem.prompt, problem.answer, dict(problem.facts)) for problem in problems]
    text = json.dumps(whole, skipkeys=True, default=lambda value: type(value).__name__)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _template(teacher: Path, student: Path, style: str, folder: Path) -> Path | None:
    """A file with the teacher's chat template, for a student that has none."""
    if style != "chat" or load_template(student) is not None or (found := load_template(teacher)) is None:
        return None
    write_text(folder / TEMPLATE, found.source)
    return folder / TEMPLATE


class _Once:
    """A model that is read when it is first wanted."""

    def __init__(self, folder: Path, dtype: str | None, say: Callable[[str], None], progress: bool):
        self.folder, self.dtype, self.say, self.progress = folder, dtype, say, progress
        self.step = None if is_hub_folder(folder) else newest_step(folder)
        self.label = str(folder.absolute()) if self.step is None else f"{folder.absolute()}, step {self.step}"
        self._loaded: Loaded | None = None

    @property
    def loaded(self) -> Loaded:
        if self._loaded is None:
            options = {"step": self.step, "progress": self.progress, "say": self.say}
            self._loaded = load(self.folder, self.dtype, **options)
        return self._loaded

    def forget(self) -> None:
        """Gives its memory back."""
        self._loaded = None
