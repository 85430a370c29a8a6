"""Answers to learn from, sampled by the engine from the weights as they are, in groups of one prompt each.

With grpo.max_staleness groups are begun before they are needed, and go on while the policy learns: a long answer does
not hold up the others. It counts rounds, of grpo.updates steps each. Every token keeps the step whose weights sampled
it. What is in the cache is never of older weights: an answer that goes on under new ones is read again, and its last
reading says the experts of all that was read.
"""

import base64
import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dsjax.config import ConfigError, GrpoConfig
from dsjax.data.tokenizer import Tokenizer
from dsjax.infer.engine import Engine
from dsjax.infer.requests import Request, Sampled
from dsjax.model.transformer import DeepSeek
from dsjax.posttrain.tasks import Problem, Task, total
from dsjax.state import RouterBias

# What answers that are under way hang on: where a run goes on with another value, they are begun anew.
_SETTINGS = ("style", "group_size", "updates", "temperature", "max_tokens", "max_staleness", "replay", "exact")


@dataclass(eq=False)
class Answer:
    """What the model says to a prompt, token by token."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)  # the step whose weights sampled each
    experts: list[np.ndarray] = field(default_factory=list)  # [L, K] int32, of the token before each
    prompt_experts: np.ndarray | None = None  # [L, P, K] int32, -1: not known
    reason: str = ""  # why it ended: "stop" or "length"


@dataclass(eq=False)
class Group:
    """A prompt and its answers."""

    number: int  # of the problem
    begun: int  # the step before which it began
    problem: Problem
    prompt: list[int]
    answers: list[Answer]
    parts: Future | None = None  # of each answer the reward by part

    @property
    def done(self) -> bool:
        return all(answer.reason for answer in self.answers)

    def rewards(self, weights) -> np.ndarray:
        """Of each answer."""
        return np.array([total(parts, weights) for parts in self.parts.result()])


class Rollouts:
    """Groups from an engine. `state` is all that it needs to go on elsewhere with the same answers."""

    def __init__(
        self,
        engine: Engine,
        task: Task,
        encode: Callable[[Problem], list[int]],
        begun: Callable[[Problem], str],
        tokenizer: Tokenizer,
        grpo: GrpoConfig,
        seed: int,
        n_groups: int,
        state: dict[str, Any] | None = None,
    ):
        self.engine, self.task, self.tokenizer = engine, task, tokenizer
        self.encode, self.begun = encode, begun  # a prompt's tokens, and what of an answer it has already
        self.grpo, self.seed, self.n_groups = grpo, seed, n_groups
        self.next = 0  # the number of the next problem
        self.groups: list[Group] = []  # begun and not yet taken, the oldest first
        self.version = 0
        self.asked: list[int] = []  # ids of the requests since the weights are new
        self.records = grpo.replay and not grpo.exact
        self.judges = ThreadPoolExecutor(1, "judge")
        if state is not None:
            self._restore(state)

    def collect(self, version: int, model: DeepSeek, router_bias: RouterBias) -> list[Group]:
        """n_groups that are done, the oldest first; those under way go on with these weights."""
        self.version = version
        self.engine.renew(model, router_bias)
        self._fill()
        for group in self.groups:
            for k, answer in enumerate(group.answers):
                if not answer.reason:
                    self._ask(group, k, answer)
        while not (taken := self._choose()):
            self.engine.step()
        self._break_off()
        for group in taken:
            self.groups.remove(group)
        return taken

    def more(self, n: int) -> list[Group]:
        """n further groups of the same weights, all done: for those whose answers have one reward."""
        groups = [self._begin() for _ in range(n)]
        for group in groups:
            for k, answer in enumerate(group.answers):
                self._ask(group, k, answer)
        self.engine.run()
        return groups

    def close(self) -> None:
        self.judges.shutdown(cancel_futures=True)

    @property
    def state(self) -> dict[str, Any]:
        """In plain values."""
        return {"next": self.next, "settings": self._settings, "groups": [_plain(group) for group in self.groups]}

    @property
    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self.grpo, name) for name in _SETTINGS}

    def _restore(self, state: dict[str, Any]) -> None:
        self.next = state["next"]
        for kept in state["groups"] if state["settings"] == self._settings else ():
            problem = self.task.problem(kept["number"])
            group = Group(kept["number"], kept["begun"], problem, self.encode(problem), [])
            for one in kept["answers"]:
                experts = _array(one["experts"])
                one["experts"] = [] if experts is None else list(experts)
                group.answers.append(Answer(**one | {"prompt_experts": _array(one["prompt_experts"])}))
            self.groups.append(group)
            self._judge(group)

    def _fill(self) -> None:
        while len(self.groups) < self.n_groups * (1 + self.grpo.max_staleness):
            self.groups.append(self._begin())

    def _begin(self) -> Group:
        problem = self.task.problem(self.next)
        answers = [Answer() for _ in range(self.grpo.group_size)]
        group = Group(self.next, self.version, problem, self.encode(problem), answers)
        self.next += 1
        return group

    def _ask(self, group: Group, k: int, answer: Answer) -> None:
        """The rest of an answer. What is sampled at a place depends on the seed and the place alone."""
        name, n_prompt, n_read = f"{self.seed} {group.number} {k}", len(group.prompt), len(answer.tokens)

        def tell(said: list[Sampled]) -> None:
            if self.records and len(answer.tokens) == n_read:  # what comes is sampled from this reading
                read = request.prompt_experts[:, : n_prompt + n_read].copy()
                known = [a.prompt_experts for a in group.answers if a.prompt_experts is not None]
                of_prompt = read[:, :n_prompt]  # one array for all answers that read it alike
                answer.prompt_experts = next((p for p in known if np.array_equal(p, of_prompt)), of_prompt)
                answer.experts = list(read[:, n_prompt - 1 : -1].swapaxes(0, 1))
            for one in said:
                answer.tokens.append(one.token)
                answer.logprobs.append(one.logprob)
                answer.versions.append(self.version)
                if self.records:
                    answer.experts.append(one.experts)

        def done(reason: str) -> None:
            if reason == "cancelled":
                return
            answer.reason = reason
            self._judge(group)

        request = Request(
            [*group.prompt, *answer.tokens],
            max_tokens=self.grpo.max_tokens - len(answer.tokens),
            temperature=self.grpo.temperature,
            seed=int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]),
            stop_ids=tuple(self.tokenizer.eos_ids),
            logprobs=0,
            keep_experts=self.records,
            tell=tell,
            done=done,
        )
        self.asked.append(request.id)
        self.engine.submit(request)

    def _judge(self, group: Group) -> None:
        """Begins to judge a group that is done, beside the sampling of others."""
        if group.done:
            texts = [self.begun(group.problem) + self.text(answer.tokens) for answer in group.answers]
            group.parts = self.judges.submit(judged, self.task, [group.problem] * len(texts), texts)

    def text(self, tokens: list[int]) -> str:
        """Of an answer, without the token that ended it."""
        ended = tokens and tokens[-1] in self.tokenizer.eos_ids
        return self.tokenizer.decode(tokens[:-1] if ended else tokens)

    def _choose(self) -> list[Group]:
        """n_groups that are done, the oldest of them, if no group gets staler than allowed without them; else none.

        The groups begun by a round must all be taken max_staleness rounds later, n_groups a round.
        """
        ready = [group for group in self.groups if group.done]
        if len(ready) < self.n_groups:
            return []
        ready = ready[: self.n_groups]
        ages = [(self.version - g.begun) // self.grpo.updates for g in self.groups if g not in ready]
        for ahead in range(self.grpo.max_staleness + 1):
            due = sum(age + ahead >= self.grpo.max_staleness for age in ages)
            if due > self.n_groups * ahead:
                return []
        return ready

    def _break_off(self) -> None:
        """Answers that are not done leave the engine; what they have said stays."""
        for id in self.asked:
            self.engine.cancel(id)
        self.asked.clear()
        self.engine.run()


def judged(task: Task, problems: list[Problem], texts: list[str]) -> list[dict[str, float]]:
    """What the task says that the texts are worth. Raises ConfigError for what cannot be learned from."""
    try:
        found = task.judge(problems, texts)
    except ConfigError:
        raise
    except Exception as error:  # whatever a task that we do not know raises ends the run, in its name
        raise ConfigError(f"{task.name}: judging failed: {type(error).__name__}: {error}") from error
    if len(found) != len(texts):
        raise ConfigError(
            f"{task.name}: expected {len(texts)} judgements of {len(texts)} answers, and got {len(found)}"
        )
    if other := {name for parts in found for name in parts} - set(task.weights):
        known = ", ".join(task.weights)
        raise ConfigError(f"{task.name}: judged by {', '.join(sorted(other))}, which has no weight; expected {known}")
    return found


def _plain(group: Group) -> dict[str, Any]:
    answers = [
        {
            "tokens": answer.tokens,
            "logprobs": answer.logprobs,
            "versions": answer.versions,
            "experts": _text(np.stack(answer.experts)) if answer.experts else None,
            "prompt_experts": None if answer.prompt_experts is None else _text(answer.prompt_experts),
            "reason": answer.reason,
        }
        for answer in group.answers
    ]
    return {"number": group.number, "begun": group.begun, "answers": answers}


def _text(a: np.ndarray) -> dict[str, Any]:
    return {"shape": list(a.shape), "int32": base64.b64encode(np.asarray(a, "<i4").tobytes()).decode()}


def _array(kept: dict[str, Any] | None) -> np.ndarray | None:
    if kept is None:
        return None
    return np.frombuffer(base64.b64decode(kept["int32"]), "<i4").reshape(kept["shape"]).astype(np.int32)
