"""Answers of a model that are worth learning from, as a data set for `dsjax sft --data`.

    with open_task("parity:24") as task:
        problems = [task.problem(i) for i in range(1000)]
        write_traces(loaded, task, problems, Path("traces.jsonl"), samples=4)

Rejection sampling as for DeepSeek-R1's 600,000 traces (reference section 7.6): several answers a problem, of which the
right ones stay, without duplicates. Every answer that came is in `traces.answers.jsonl` beside the file: what is there
is not asked again, whether the command was killed, or other answers are to be kept.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from dsjax.config import ConfigError, EngineConfig, show
from dsjax.files import write_text
from dsjax.hub.load import Loaded
from dsjax.posttrain.evaluate import Asked, Asking, ask, check_judged, is_right
from dsjax.posttrain.problem import Problem
from dsjax.posttrain.rewards.language import LANGUAGES, language_reward, words_by_script
from dsjax.posttrain.tasks import Task, render, total

FORMS = ("format", "think")  # rewards for the form of an answer: where a task has them, a right answer earns them too
REASONS = ("cut_off", "wrong", "empty", "long", "mixed", "duplicate", "over")  # why an answer is not kept, in order
Keep = Literal["right", "all"] | Callable[[Mapping[str, float]], bool]


def write_traces(
    loaded: Loaded,
    task: Task,
    problems: Sequence[Problem],
    out: Path,
    *,
    samples: int = 4,
    keep: Keep = "right",
    most: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_tokens: int = Asking.max_tokens,
    longest: int | None = None,
    language: float = 0.0,
    style: str = "plain",
    seed: int = 0,
    max_rows: int = EngineConfig.max_rows,
    label: str = "",
    progress: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, int]:
    """Writes the answers to keep as .jsonl records that `dsjax sft` reads; returns how many there are, and of what.

    keep: those that every reward calls right, with the form that the task asks for; all; or what a function of an
    answer's rewards says. most: kept answers a problem, the first ones. longest: tokens of an answer. language: least
    share of its words in one language (the problem's, if it says which). An answer that was cut off, never ended the
    reasoning that the prompt began, or is empty is never kept. label: of the model, which the answers that are there
    already must be of. Raises ConfigError for problems that cannot be asked or judged, and for another's file.
    """
    if not isinstance(keep, str):
        wanted = keep
    elif keep not in ("right", "all"):
        raise ConfigError(f"keep={show(keep)}: expected right or all")
    else:
        wanted = right if keep == "right" else lambda parts: True
    if keep == "right":
        check_judged(task, problems)
    answers = answers_of(out)
    if out.is_file() and not answers.is_file():
        raise ConfigError(f"{out}: not one that this command wrote; expected a new file, or its own")
    out.parent.mkdir(parents=True, exist_ok=True)
    asked = ask(
        loaded,
        task,
        problems,
        Asking(samples, temperature, top_p, max_tokens, seed, style),
        max_rows=max_rows,
        out=answers,
        label=label,
        progress=progress,
        say=say,
    )
    counts = {"problems": len(problems), "answers": len(asked), "solved": 0, "kept": 0} | dict.fromkeys(REASONS, 0)
    kept: Counter[str] = Counter()
    seen: set[tuple[str, str]] = set()
    lines = []
    for one in asked:
        problem = problems[one.answer.problem]
        line = record(problem, one, task.weights, style)
        asked_of = prompt_key(problem)
        key = (asked_of, one.text)
        refused = (
            one.answer.reason != "stop" or _still_thinking(one),
            not wanted(one.parts),
            not one.answer.text.strip(),
            longest is not None and one.answer.n_tokens > longest,
            bool(language) and language_share(problem, one.text) < language,
            key in seen,
            most is not None and kept[asked_of] >= most,
        )
        if any(refused):
            counts[REASONS[refused.index(True)]] += 1
            continue
        seen.add(key)
        kept[asked_of] += 1
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_text(out, "".join(lines))
    return counts | {"kept": len(lines), "solved": len(kept)}


def prompt_key(problem: Problem) -> str:
    """The prompt as one text, by which problems are told apart."""
    return json.dumps(problem.prompt, sort_keys=True)


def distinct(task: Task, n: int) -> list[Problem]:
    """The task's first n problems to learn from, each prompt once: a short file comes round again."""
    return list({prompt_key(problem): problem for problem in map(task.problem, range(n))}.values())


def answers_of(out: Path) -> Path:
    """The file beside the traces that has all answers."""
    return out.with_name(f"{out.stem}.answers.jsonl")


def right(parts: Mapping[str, float]) -> bool:
    """Whether an answer is right, and of the form that is asked for, if one is."""
    return is_right(parts) and all(parts[name] >= 1 for name in FORMS if name in parts)


def _still_thinking(asked: Asked) -> bool:
    """Whether the prompt began a reasoning that the answer did not end."""
    return asked.text != asked.answer.text and "</think>" not in asked.text


def language_share(problem: Problem, text: str) -> float:
    """The share of words in the problem's language, or, where it does not say which, in the text's commonest script."""
    language = problem.facts.get("language")
    if isinstance(language, str) and language in LANGUAGES:
        return language_reward(text, language)
    counts = words_by_script(text)
    return max(counts.values()) / sum(counts.values()) if counts else 1.0


def record(problem: Problem, asked: Asked, weights: Mapping[str, float], style: str) -> dict[str, Any]:
    """What `dsjax sft` reads: messages for the chat template, or a prompt as it was rendered and what was said behind
    it; and what it does not: which answer it is, and what it is worth."""
    answer, prompt = asked.answer, problem.prompt
    if style == "chat":
        given = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        before = [{**m, "weight": 0} if m["role"] == "assistant" else dict(m) for m in given]  # not the model's words
        said = {"messages": [*before, {"role": "assistant", "content": asked.text}]}
    else:
        said = {"prompt": render(problem, None, style), "completion": answer.text}
    worth = {"reward": total(asked.parts, weights), "rewards": asked.parts}
    return {**said, "problem": answer.problem, "sample": answer.sample, "tokens": answer.n_tokens, **worth}
