"""Which answers are learned from, and when: with an engine that says what it is told to, in any order of finishing."""

import functools
import json
import random
from collections import deque
from types import SimpleNamespace

import checks
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.config import ConfigError, EngineConfig, GrpoConfig, replace
from dsjax.data.tokenizer import bytes_tokenizer
from dsjax.hub.load import Loaded
from dsjax.infer.engine import Engine as RealEngine
from dsjax.infer.requests import Sampled
from dsjax.posttrain import policy, rows
from dsjax.posttrain.problem import Problem
from dsjax.posttrain.rollouts import Rollouts
from sharding.mesh import make_mesh

TOKENIZER = bytes_tokenizer()
ROUNDS = 6


class Engine:
    """Some of its requests get a token a step, whichever the seed of its luck says. What is said at a place depends on
    the request's seed and the place."""

    def __init__(self, luck: int):
        self.luck, self.n_renewed, self.n_steps = luck, 0, 0
        self.waiting, self.running = deque(), []

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def renew(self, model, router_bias):
        assert not self.busy
        self.model, self.n_steps = model, 0  # luck is by weights, so that a run that goes on has the same

    def submit(self, request):
        request.tokens = list(request.prompt)
        self.waiting.append(request)

    def cancel(self, id):
        for request in [r for r in (*self.waiting, *self.running) if r.id == id]:
            (self.running if request in self.running else self.waiting).remove(request)
            request.done("cancelled")

    def run(self):
        while self.busy:
            self.step()

    def step(self):
        self.running += self.waiting
        self.waiting.clear()
        self.n_steps += 1
        for request in list(self.running):
            draw = random.Random(f"{self.luck} {self.model} {self.n_steps} {request.seed}").random()
            if draw > (request.seed % 7) / 8:  # some are much slower than others
                self.say(request)

    def say(self, request):
        place = random.Random(f"{request.seed} {len(request.tokens)}")
        token = TOKENIZER.eos_id if place.random() < 0.2 else place.randrange(10, 200)
        request.prompt_experts = np.full((1, len(request.prompt), 2), self.model, np.int32)
        request.tokens.append(token)
        request.tell([Sampled(token, -place.random(), experts=np.array([[self.model, token]], np.int32))])
        if token == TOKENIZER.eos_id or request.n_new >= request.max_tokens:
            self.running.remove(request)
            request.done("stop" if token == TOKENIZER.eos_id else "length")


class Task:
    name, weights = "numbers", {"accuracy": 1.0}

    def problem(self, index):
        return Problem(str(index), str(index))

    def heldout(self):
        return []

    def judge(self, problems, texts):
        return [{"accuracy": float(len(text) % 2)} for text in texts]


def new(luck: int, n_groups: int, state=None, task=None, **options) -> Rollouts:
    grpo = GrpoConfig(**{"task": "numbers", "group_size": 2, "max_tokens": 5, "style": "plain", **options})
    encode, begun = (lambda problem: TOKENIZER.encode(problem.prompt)), (lambda problem: "")
    return Rollouts(Engine(luck), task or Task(), encode, begun, TOKENIZER, grpo, 0, n_groups, state)


def said(groups) -> list:
    return [
        (g.number, g.begun, g.prompt, [(a.tokens, a.logprobs, a.versions, a.reason) for a in g.answers],
         np.array([e for a in g.answers for e in a.experts]).tolist(), g.rewards({"accuracy": 1.0}).tolist())
        for g in groups
    ]  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(
    luck=st.integers(0, 10**6),
    n_groups=st.integers(1, 4),
    max_staleness=st.integers(0, 3),
    updates=st.integers(1, 3),
    resumed_at=st.integers(0, ROUNDS - 1),
)
def test_no_answer_is_staler_than_allowed_and_each_group_is_learned_from_once(
    luck, n_groups, max_staleness, updates, resumed_at
):
    options = {"max_staleness": max_staleness, "updates": updates}
    rollouts, kept, rounds = new(luck, n_groups, **options), None, []
    for n in range(ROUNDS):
        version = n * updates
        groups = rollouts.collect(version, version, None)
        rounds.append(said(groups))
        assert len(groups) == n_groups and not rollouts.engine.busy
        assert [g.number for g in groups] == sorted(g.number for g in groups)
        for group in groups:
            assert group.done
            for answer in group.answers:
                assert len(answer.tokens) == len(answer.logprobs) == len(answer.versions) == len(answer.experts)
                assert min(answer.versions) >= version - max_staleness * updates
                assert answer.versions == sorted(answer.versions)
                last = answer.versions[-1]  # whose reading the experts of all tokens are of
                assert [e[0][0] for e in answer.experts] == [last] * len(answer.tokens)
                assert answer.prompt_experts.shape == (1, len(group.prompt), 2) and np.all(
                    answer.prompt_experts == last
                )
        left = [g for g in rollouts.groups if g.done]
        assert all(g.number > max(one.number for one in groups) for g in left)  # of those done the oldest
        if n == resumed_at:
            kept = json.loads(json.dumps(rollouts.state))
    taken = [number for of_round in rounds for number, *_ in of_round]
    assert len(taken) == len(set(taken))
    assert sorted([*taken, *(g.number for g in rollouts.groups)]) == list(range(rollouts.next))
    if max_staleness == 0:
        assert taken == list(range(ROUNDS * n_groups)) and not rollouts.groups
    rollouts.close()

    other = new(luck, n_groups, kept, **options)
    for n in range(resumed_at + 1, ROUNDS):
        assert said(other.collect(n * updates, n * updates, None)) == rounds[n]
    other.close()


def test_an_answer_that_goes_on_under_new_weights_is_read_by_training_as_it_was_by_the_sampler(tmp_path):
    """Two layers of experts: what the first one chooses for a token is what the second one reads of it."""
    config = replace(checks.config(max_staleness=1, temperature=1.0), batch_size=4)
    tokenizer = SimpleNamespace(eos_ids=range(36, models.VOCAB), decode=str)  # one token in four ends an answer
    mesh, gone_on = make_mesh(jax.devices()[:1]), []
    with jax.set_mesh(mesh):
        (_, bias), *policies = (models.draw(config.model, seed) for seed in range(6))
        options = EngineConfig(max_rows=8, max_model_len=config.seq_len, n_draft=0)
        engine = RealEngine(Loaded(*policies[0], mesh, config, tmp_path), options)
        rollouts = Rollouts(engine, Task(), lambda p: [5, 9, 7, 3], lambda p: "", tokenizer, config.grpo, 0, 1)
        score = jax.jit(functools.partial(policy.score, compute=config.compute))
        for version, (model, _) in enumerate(policies):
            groups = rollouts.collect(version, model, bias)
            (arrays,) = rows.rollouts(groups, np.zeros((1, 4)), version, config)
            given = rows.on_mesh(arrays, mesh)
            logp = score(model, bias, given.batch, jnp.float32(1), given.experts)
            apart = np.abs(np.asarray(logp) - arrays["sampler"])[arrays["fresh"]]
            gone_on += [a.versions for g in groups for a in g.answers if len(set(a.versions)) > 1]
            assert apart.max(initial=0) < 1e-5
        rollouts.close()
    assert len(gone_on) > 2


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_groups_beyond_those_asked_for_are_whole_and_of_these_weights(max_staleness):
    rollouts = new(3, 2, max_staleness=max_staleness)
    groups = rollouts.collect(4, 4, None)
    more = rollouts.more(3)
    assert all(g.done and {v for a in g.answers for v in a.versions} == {4} for g in more)
    numbers = [g.number for g in (*groups, *more, *rollouts.groups)]
    assert sorted(numbers) == list(range(rollouts.next))
    rollouts.close()


def test_what_is_not_done_when_the_rest_is_leaves_the_engine_and_its_words_stay():
    """Groups of the round before that are done already: none of the others has to come to its end for them."""
    rollouts = new(0, 1, max_staleness=3, max_tokens=40)
    for version in range(12):
        before = {id(a): len(a.tokens) for g in rollouts.groups for a in g.answers}
        ready = bool(rollouts.groups) and rollouts.groups[0].done
        rollouts.collect(version, version, None)
        for group in rollouts.groups:
            for answer in group.answers:
                assert len(answer.tokens) >= before.get(id(answer), 0)
        if ready and rollouts.groups:
            assert rollouts.engine.n_steps <= 2
    rollouts.close()


@pytest.mark.parametrize("change", [{"max_staleness": 0}, {"group_size": 3}, {"max_tokens": 2}], ids=str)
def test_with_other_settings_what_was_under_way_is_begun_anew(change):
    options = {"max_staleness": 2}
    first = new(1, 2, **options)
    first.collect(0, 0, None)
    kept = json.loads(json.dumps(first.state))
    other = new(1, 2, kept, **options | change)
    groups = other.collect(1, 1, None)
    assert min(g.number for g in (*groups, *other.groups)) == first.next
    assert {v for g in groups for a in g.answers for v in a.versions} == {1}
    first.close(), other.close()


class Broken(Task):
    def __init__(self, judge):
        self.judge = judge


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        (lambda problems, texts: 1 / 0, "numbers: judging failed: ZeroDivisionError: division by zero"),
        (lambda problems, texts: [{"accuracy": 1.0}], "numbers: expected 2 judgements of 2 answers, and got 1"),
        (
            lambda problems, texts: [{"style": 1.0}] * len(texts),
            "numbers: judged by style, which has no weight; expected accuracy",
        ),
    ],
    ids=["error", "too few", "another part"],
)
def test_what_a_judge_does_wrong_is_one_line(judge, message):
    rollouts = new(0, 1, task=Broken(judge))
    (group,) = rollouts.collect(0, 0, None)
    with pytest.raises(ConfigError) as found:
        group.rewards({"accuracy": 1.0})
    assert str(found.value) == message
    rollouts.close()
