"""What a model is asked in post-training, and how its answers are judged.

A task is a source of problems and a table of rewards by weight. `open_task` finds one by what a user types: a file
(`problems.jsonl`), or a name.

with open_task("gym:chain_sum?max_terms=4", weights="gym:1,format:0.5") as task:
    problem = task.problem(0)
    tokens = encode(problem, tokenizer, None, "r1_zero")
    (parts,) = task.judge([problem], [text])
    reward = total(parts, task.weights)
"""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol, runtime_checkable

from dsjax.config import ConfigError, nearest, show
from dsjax.data.tokenizer import Tokenizer
from dsjax.hub.chat import ChatTemplate
from dsjax.posttrain.gym import open_gym
from dsjax.posttrain.judging import read_weights
from dsjax.posttrain.mix import TaskMix, parts
from dsjax.posttrain.parity import open_parity
from dsjax.posttrain.problem import Problem
from dsjax.posttrain.problem_file import ProblemFile

R1_ZERO = """\
Below, a User asks something and an Assistant solves it. The Assistant first reasons it out for itself, and only then \
tells the User the answer. What it reasons stands between <think> and </think>, and the answer between <answer> and \
</answer>: <think> the reasoning </think> <answer> the answer </answer>.
User: {prompt}
Assistant:"""  # as R1-Zero's is described (reference section 7.6), in other words
STYLES = ("plain", "r1_zero", "chat")


@runtime_checkable
class Task(Protocol):
    """Problems without end to learn from, some that are held out, and what an answer is worth.

    Those of `open_task` are contexts, or have `close`, which ends what judges; and `answer(problem, text)`, which
    cuts out of a text what is judged, None if there is nothing.
    """

    name: str
    weights: Mapping[str, float]  # of each part of the reward

    def problem(self, index: int) -> Problem:
        """The index-th problem to learn from: a pure function of it, and of the task."""

    def heldout(self) -> list[Problem]:
        """Problems that none of those to learn from is."""

    def judge(self, problems: list[Problem], texts: list[str]) -> list[dict[str, float]]:
        """Each text's reward by part, before weights; the texts are what the model said behind the prompts.

        `dsjax grpo` calls it from a thread of its own, one call at a time, while others ask for problems.
        """


def total(parts: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The sum of the parts by weight."""
    return sum(weights[name] * value for name, value in parts.items())


def is_file(spec: str | Path) -> bool:
    """Whether there is a file of this name; what is too long for one is none."""
    try:
        return Path(spec).is_file()
    except OSError:
        return False


def open_task(
    spec: str | Path,
    *,
    weights: str | Mapping[str, float] | None = None,
    seed: int = 0,
    heldout: str | Path | None = None,
) -> Task:
    """The task of a .jsonl file, of `gym:NAME?option=value&...`, of `parity:BITS`, or of several of them by weight:
    `a.jsonl:0.7,parity:24:0.3`.

    weights: of the parts of the reward, as `accuracy:1,format:0.5`; by default accuracy, a gym's own score, or the
    parts that a file's lines name. heldout: a file of problems to measure with; a file's own (see ProblemFile) if not
    given. Raises ConfigError for what is none, with its line in a file; for a reward that a problem has not the means
    for; and where code would run without a sandbox.
    """
    if not is_file(spec) and len(mixed := parts(str(spec))) > 1:
        return _open_mix(mixed, weights, seed, heldout)
    kind, colon, rest = str(spec).partition(":")
    if colon and kind in ("gym", "parity") and heldout is not None:
        raise ConfigError(
            f"heldout={show(str(heldout))}: expected with a file; {kind} has held-out problems of its own"
        )
    if colon and kind == "gym":
        return open_gym(rest, weights, seed)
    if colon and kind == "parity":
        if weights is not None and read_weights(weights) != {"accuracy": 1}:
            raise ConfigError(f"rewards={show(weights)}: expected accuracy alone, for parity")
        return open_parity(rest, seed)
    path = Path(spec)
    if not is_file(path):
        near = f"; the nearest is {nearest(kind, ['gym', 'parity'])[0]}:" if colon else ""
        raise ConfigError(f"task={show(str(spec))}: expected a .jsonl file, gym:NAME, or parity:BITS{near}")
    return ProblemFile(path, weights, seed, None if heldout is None else Path(heldout))


def _open_mix(mixed: list[tuple[str, float]], weights, seed: int, heldout) -> Task:
    """weights: each task takes those that it knows; the lines of a file say which are theirs (`rewards`)."""
    if heldout is not None:
        raise ConfigError(f"heldout={show(str(heldout))}: expected with one file, and this is a mix of {len(mixed)}")
    given = None if weights is None else read_weights(weights)
    with ExitStack() as stack:
        tasks = []
        for name, _ in mixed:
            kind = name.partition(":")[0]
            refused = ("choice", "code") if kind == "gym" else ("gym",)
            known = None if given is None else {part: weight for part, weight in given.items() if part not in refused}
            if kind == "parity":
                known = None
            elif known == {}:
                raise ConfigError(f"rewards={', '.join(given)}: expected one that {name} can be judged by as well")
            tasks.append(stack.enter_context(open_task(name, weights=known, seed=seed)))
        mix = TaskMix(tasks, [share for _, share in mixed], given)
        stack.pop_all()
    return mix


def render(problem: Problem, template: ChatTemplate | None, style: str) -> str:
    """The text of a prompt: "plain", in R1-Zero's preamble ("r1_zero"), or in the chat template ("chat").

    Raises ConfigError for another style, for messages where a text is wanted, and without a template.
    """
    prompt = problem.prompt
    if style == "chat":
        if template is None:
            raise ConfigError("style=chat: the model has no chat template; expected plain or r1_zero")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        return template.render(messages)
    if style not in STYLES:
        raise ConfigError(
            f"style={show(style)}: expected {', '.join(STYLES)}; the nearest is {nearest(style, STYLES)[0]}"
        )
    if not isinstance(prompt, str):
        raise ConfigError(f"style={style}: expected a prompt that is a text, and got messages; style=chat takes them")
    return prompt if style == "plain" else R1_ZERO.replace("{prompt}", prompt)


def encode(problem: Problem, tokenizer: Tokenizer, template: ChatTemplate | None, style: str) -> list[int]:
    """The tokens of a prompt, from the one that begins a text on. Raises ConfigError as `render` does."""
    text = render(problem, template, style)
    return tokenizer.encode_rendered(text) if style == "chat" else [tokenizer.bos_id, *tokenizer.encode(text)]


def begun(problem: Problem, template: ChatTemplate | None, style: str) -> str:
    """What of an answer the prompt's end has already: "<think>", as R1's chat template writes it, or nothing.

    To be put before what the model said, for `judge`.
    """
    return "<think>" if style == "chat" and render(problem, template, style).rstrip().endswith("<think>") else ""
