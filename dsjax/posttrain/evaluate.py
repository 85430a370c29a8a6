"""How well a model solves a task: n samples a problem, judged by the task's rewards.

with open_task("gym:chain_sum") as task:
    result = evaluate(loaded, task, task.heldout(), Asking(samples=16))
    result["pass@1"], result["maj@16"]
"""

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from dsjax.config import ConfigError, EngineConfig, nearest, show
from dsjax.files import write_text
from dsjax.hub.chat import ChatTemplate
from dsjax.hub.load import Loaded
from dsjax.infer.engine import Engine
from dsjax.infer.requests import Request
from dsjax.infer.text import Text
from dsjax.posttrain.problem import Problem
from dsjax.posttrain.rewards.answer import number, plain
from dsjax.posttrain.tasks import Task, begun, encode, total

RIGHT = ("accuracy", "choice", "code", "gym")  # the rewards that say whether an answer is right: where they are 1
BEST_BY = ("reward", "logprob")


@dataclass(frozen=True)
class Asking:
    """How a model is asked. The defaults are those of R1's evaluation (reference section 7.6), but for the length."""

    samples: int = 16  # a problem
    temperature: float = 0.6  # 0: the likeliest tokens, once
    top_p: float = 0.95
    max_tokens: int = 2048  # of an answer; less where the model has no room for them
    seed: int = 0
    style: str = "plain"

    def __post_init__(self):
        if self.samples > 1 and not self.temperature:
            raise ConfigError(f"samples={self.samples}: expected 1 with temperature=0, which gives one answer")


class Answer(NamedTuple):
    """What the model said to a problem, the sample-th time."""

    problem: int
    sample: int
    text: str
    reason: str  # "stop" or "length"
    n_tokens: int
    logprob: float  # mean over its tokens, of the tempered distribution


class Asked(NamedTuple):
    """An answer, the whole text that is judged, and what it is worth by part."""

    answer: Answer
    text: str
    parts: dict[str, float]


class Judged(NamedTuple):
    """What an answer is worth."""

    right: bool
    reward: float  # by weight
    form: float  # of those rewards alone that need no answer key
    said: str | None  # the answer in plain form; None where there is none
    logprob: float


def evaluate(
    loaded: Loaded,
    task: Task,
    problems: Sequence[Problem],
    asking: Asking = Asking(),
    *,
    best_by: str = "logprob",
    max_rows: int = EngineConfig.max_rows,
    out: Path | None = None,
    label: str = "",
    progress: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Shares of problems solved: pass@k, maj@k, the best of n; and lengths and rewards, each a mean.

    out: a file that keeps every answer as a line of JSON, with its rewards at the end; what it has is not asked again.
    label: of the model, which that file must be of. best_by: what the best of n is chosen by, logprob, or the rewards
    that need no answer key. Raises ConfigError for problems that cannot be asked or judged.
    """
    if best_by not in BEST_BY:
        raise ConfigError(
            f"best_by={show(best_by)}: expected reward or logprob; the nearest is {nearest(best_by, BEST_BY)[0]}"
        )
    if best_by == "reward" and set(task.weights) <= set(RIGHT):
        raise ConfigError(f"best_by=reward: expected logprob: each of {', '.join(task.weights)} needs the answer")
    check_judged(task, problems)
    options = {"max_rows": max_rows, "out": out, "label": label, "progress": progress, "say": say}
    asked = ask(loaded, task, problems, asking, **options)
    cut = getattr(task, "answer", lambda problem, text: None)
    judged: list[list[Judged]] = [[] for _ in problems]
    for answer, text, of in asked:
        form = {name: value for name, value in of.items() if name not in RIGHT}
        said = canonical(cut(problems[answer.problem], text))
        worth = total(of, task.weights), total(form, task.weights)
        judged[answer.problem].append(Judged(is_right(of), *worth, said, answer.logprob))
    parts = [of for _, _, of in asked]
    named = sorted({name for of in parts for name in of}, key=list(task.weights).index)
    return {
        "task": task.name,
        "problems": len(problems),
        "samples": asking.samples,
        **_shares(judged, best_by),
        "reward": float(np.mean([one.reward for row in judged for one in row])),
        **{f"reward_{name}": float(np.mean([of[name] for of in parts if name in of])) for name in named},
        "tokens": float(np.mean([answer.n_tokens for answer, _, _ in asked])),
        "truncated": float(np.mean([answer.reason == "length" for answer, _, _ in asked])),
    }


def ask(
    loaded: Loaded,
    task: Task,
    problems: Sequence[Problem],
    asking: Asking = Asking(),
    *,
    max_rows: int = EngineConfig.max_rows,
    out: Path | None = None,
    label: str = "",
    progress: bool = False,
    say: Callable[[str], None] = print,
) -> list[Asked]:
    """Every answer to every problem, in order, and what it is worth; out, label and ConfigError as of `evaluate`."""
    if not problems:
        raise ConfigError(f"{task.name}: no problems to ask")
    template = ChatTemplate.load(loaded.folder) if asking.style == "chat" else None
    prompts = [encode(problem, loaded.tokenizer, template, asking.style) for problem in problems]
    kept = None if out is None else _Kept(out, _head(loaded, task, prompts, asking, label), say)
    answers = _ask(loaded, prompts, asking, max_rows, kept, progress)
    before = [begun(problem, template, asking.style) for problem in problems]
    texts = [before[answer.problem] + answer.text for answer in answers]
    parts = task.judge([problems[answer.problem] for answer in answers], texts)
    if kept is not None:
        kept.write(answers, parts)
    return list(map(Asked, answers, texts, parts))


def check_judged(task: Task, problems: Sequence[Problem]) -> None:
    """Raises ConfigError for a problem whose rewards do not say whether an answer is right."""
    for n, problem in enumerate(problems):
        names = problem.facts.get("rewards", task.weights)
        if not set(names) & set(RIGHT):
            raise ConfigError(
                f"rewards={show(list(names))}: problem {n}: expected one of {', '.join(RIGHT)} among them"
            )


def is_right(parts: Mapping[str, float]) -> bool:
    """Whether every reward that says if an answer is right gives 1."""
    return all(parts[name] >= 1 for name in RIGHT if name in parts)


def pass_at(k: int, n: int, right: int) -> float:
    """The share of all k of n samples of which at least one is right, if `right` are (arXiv:2107.03374).

    Raises ValueError for k > n.
    """
    if k > n:
        raise ValueError(f"k={k}: expected at most n={n}")
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority(said: Sequence[str | None]) -> int | None:
    """The first sample that says what most of them say; of equals, what was said first. None if none says anything."""
    votes = Counter(answer for answer in said if answer is not None)  # in the order they came
    return said.index(max(votes, key=votes.__getitem__)) if votes else None


def canonical(answer: str | None) -> str | None:
    """An answer as it is counted: a number as a fraction, else its plain form. None if there is none."""
    if not answer or not (text := plain(answer)):
        return None
    value = number(text)
    return text if value is None else str(value)


def powers(n: int) -> list[int]:
    """1, 2, 4, ... up to n, and n."""
    return sorted({n, *(2**i for i in range(n.bit_length()))})


def _shares(judged: list[list[Judged]], best_by: str) -> dict[str, float]:
    n = len(judged[0])
    rights = np.array([[one.right for one in row] for row in judged])
    mean = rights.mean(axis=1)
    shares = {f"pass@{k}": float(np.mean([pass_at(k, n, int(r)) for r in rights.sum(axis=1)])) for k in powers(n)}
    shares["pass@1_error"] = float(np.std(mean, ddof=1) / math.sqrt(len(mean))) if len(mean) > 1 else 0.0
    if n == 1:
        return shares
    for k in powers(n)[1:] if any(one.said is not None for row in judged for one in row) else ():
        voted = [majority([one.said for one in row[:k]]) for row in judged]
        shares[f"maj@{k}"] = float(np.mean([i is not None and row[i].right for i, row in zip(voted, judged)]))
    by = {"reward": "form", "logprob": "logprob"}[best_by]
    best = [max(row, key=lambda one: getattr(one, by)) for row in judged]  # the first of equals
    return shares | {f"best@{n}_by_{best_by}": float(np.mean([one.right for one in best]))}


def _ask(
    loaded: Loaded, prompts: list[list[int]], asking: Asking, max_rows: int, kept: "_Kept | None", progress: bool
) -> list[Answer]:
    """All answers in order: those that are kept, and the others by the engine."""
    answers = {} if kept is None else kept.answers()
    longest = loaded.config.model.max_position_embeddings
    for n, prompt in enumerate(prompts):
        if len(prompt) >= longest:
            raise ConfigError(
                f"problem {n}: {len(prompt)} tokens; expected at most {longest - 1}, to leave room to answer"
            )
    todo = [(i, j) for i in range(len(prompts)) for j in range(asking.samples) if (i, j) not in answers]
    if kept is not None and answers:
        kept.say(f"{kept.path}: {len(answers)} answers are there already; {len(todo)} are left")
    room = min(longest, max(map(len, prompts)) + asking.max_tokens)
    with (
        jax.set_mesh(loaded.mesh),
        tqdm(total=len(todo), desc="answers", disable=not progress, leave=False) as bar,
    ):
        engine = Engine(loaded, EngineConfig(max_rows=max_rows, max_model_len=room)) if todo else None
        for i, j in todo:
            request = Request(
                prompts[i],
                max_tokens=min(asking.max_tokens, room - len(prompts[i])),
                temperature=asking.temperature,
                top_p=asking.top_p,
                seed=int.from_bytes(hashlib.sha256(f"{asking.seed} {i} {j}".encode()).digest()[:4]),
                stop_ids=loaded.tokenizer.eos_ids,
                logprobs=0,
            )
            _follow(request, (i, j), Text(loaded.tokenizer), answers, kept, bar)
            engine.submit(request)
        if engine is not None:
            engine.run()
    return [answers[key] for key in sorted(answers)]


def _follow(request: Request, key: tuple[int, int], text: Text, answers: dict, kept: "_Kept | None", bar) -> None:
    pieces, logprobs = text.follow(request), []
    listen = request.tell

    def tell(said):
        logprobs.extend(one.logprob for one in said)
        return listen(said)

    def done(reason):
        words = "".join(pieces) + text.end()
        answers[key] = Answer(*key, words, reason, request.n_new, float(np.mean(logprobs)))
        if kept is not None:
            kept.add(answers[key])
        bar.update()

    request.tell, request.done = tell, done


def _head(loaded: Loaded, task: Task, prompts: list[list[int]], asking: Asking, label: str) -> dict[str, Any]:
    """What all answers of a file have in common."""
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]
    model = {"model": label, "precision": loaded.config.compute.precision}
    return {**model, "task": task.name, "prompts": digest, **dataclasses.asdict(asking), "seeds": "sha256"}


class _Kept:
    """A file of answers: a line that says what they are to, and a line each."""

    def __init__(self, path: Path, head: dict[str, Any], say: Callable[[str], None]):
        self.path, self.head, self.say = path, head, say
        text = path.read_bytes().decode("utf-8", "replace") if path.is_file() else ""
        *lines, last = text.split("\n")
        read = [_object(line) for line in lines]
        if last and not lines and not last.startswith('{"asked"'):
            read.append(None)  # else the last line was cut off
        if read and (None in read or "asked" not in read[0] or not all("problem" in line for line in read[1:])):
            raise ConfigError(f"{path}: not one that this command wrote; expected a new file, or its own")
        for name, value in head.items() if read else ():
            if read[0]["asked"].get(name) != value:
                was = show(read[0]["asked"].get(name))
                raise ConfigError(
                    f"{path}: its answers are of {name}={was}, and now it is {show(value)}; expected a new file"
                )
        self._read = [Answer(*(line[name] for name in Answer._fields)) for line in read[1:]]
        self.write(self._read)

    def answers(self) -> dict[tuple[int, int], Answer]:
        return {(answer.problem, answer.sample): answer for answer in self._read}

    def add(self, answer: Answer) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(answer._asdict()))

    def write(self, answers: Sequence[Answer], parts: Sequence[dict[str, float]] | None = None) -> None:
        """All lines anew, with what they are worth if it is known."""
        lines = [a._asdict() for a in answers]
        if parts is not None:
            lines = [line | {"rewards": of} for line, of in zip(lines, parts)]
        write_text(self.path, "".join(map(_line, ({"asked": self.head}, *lines))))


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _object(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
