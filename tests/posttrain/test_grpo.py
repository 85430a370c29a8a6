"""The loop on a toy: it learns, goes on after any end with the same answers, and each option does what it says."""

import copy
import functools
import json
import os
import re
import shutil
import signal
from types import MappingProxyType

import jax
import models
import numpy as np
import pytest
import runs
import toys

from dsjax.config import ConfigError, EngineConfig, replace
from dsjax.hub.load import Loaded, load
from dsjax.infer.engine import Engine
from dsjax.infer.requests import Request
from dsjax.posttrain import grpo, recipes
from dsjax.posttrain.exact import ExactEngine
from dsjax.posttrain.problem import Problem
from dsjax.posttrain.rollouts import Rollouts
from dsjax.posttrain.rows import length_penalty
from dsjax.posttrain.telling import farewell_rows
from dsjax.train import checkpoint, page, picture
from sharding.mesh import make_mesh


@pytest.fixture(scope="module", autouse=True)
def compiled_programs(tmp_path_factory):
    with runs.compiled_once(tmp_path_factory):
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return toys.source(tmp_path_factory.mktemp("source") / "micro")


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    toys.share(monkeypatch)


def train(source, folder, task=None, **changes):
    """Rows of metrics, by kind."""
    grpo.train(toys.config(source, **changes), folder, source=source, quiet=True, task=task or toys.Low())
    return toys.rows(folder, "train")


def watch(monkeypatch, owner, name: str, see):
    """Calls see(self, result, *arguments) behind each call of a method."""
    right = getattr(owner, name)

    def watched(self, *args):
        result = right(self, *args)
        see(self, result, *args)
        return result

    monkeypatch.setattr(owner, name, watched)


def leaves(tree) -> list[np.ndarray]:
    return [np.asarray(a).copy() for a in jax.tree.leaves(tree)]


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


@pytest.fixture(scope="module", params=[0, 1], ids=["in step", "a round behind"])
def whole(request, source, tmp_path_factory):
    """A run that nothing disturbed: (its folder, its settings)."""
    folder, settings = tmp_path_factory.mktemp("whole") / "run", {"steps": 8, "max_staleness": request.param}
    with pytest.MonkeyPatch.context() as patch:
        toys.share(patch)
        train(source, folder, **settings)
    return folder, settings


def test_the_mean_reward_rises_and_the_sampler_says_what_the_trainer_says(whole):
    rows = toys.rows(whole[0], "train")
    rewards = [row["reward"] for row in rows]
    assert np.mean(rewards[-2:]) > np.mean(rewards[:2]) + 0.15
    gaps = [(row["gap"], row["gap_max"]) for row in rows if row["gap"] is not None]  # of older tokens there is none
    assert len(gaps) >= 4 and max(mean for mean, _ in gaps) < 1e-6
    assert min(most for _, most in gaps) > 0 and max(most for _, most in gaps) < 1e-5
    evaluations = toys.rows(whole[0], "eval")
    assert [row["step"] for row in evaluations] == [0, 4, 8]
    assert evaluations[-1]["heldout_reward"] > evaluations[0]["heldout_reward"]
    assert all(0 <= row["pass_1"] <= row["pass_2"] <= 1 for row in evaluations)
    said = (whole[0] / "samples/step-000008.txt").read_text()
    assert "# problem 1, expected '0'\n7=\n" in said and "## answer 2: accuracy " in said
    stale = [row["staleness"] for row in rows]
    assert (stale == [0] * 8) if whole[1]["max_staleness"] == 0 else (max(stale) > 0 and max(stale) <= 1)


class Killed(BaseException):
    """As kill -9, but for this process."""


def test_a_run_killed_twice_goes_on_with_the_same_rewards(whole, source, tmp_path, monkeypatch):
    """Before its first checkpoint, and while it samples behind one."""
    folder, settings = whole
    for owner, name, at in ((grpo.Run, "_learn", 1), (Engine, "step", 40)):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            seen = iter(range(1000))

            def see(*_, seen=seen, at=at):
                if next(seen) == at:
                    raise Killed

            watch(patch, owner, name, see)
            train(source, tmp_path / "run", **settings)
    assert 3 <= len(toys.rows(tmp_path / "run", "train")) < 8
    train(source, tmp_path / "run", **settings)
    assert toys.rows(tmp_path / "run") == toys.rows(folder)


def test_a_run_told_to_end_saves_and_goes_on_with_the_same_rewards(whole, source, tmp_path, monkeypatch, capsys):
    folder, settings = whole
    with monkeypatch.context() as patch:
        watch(patch, Rollouts, "collect", lambda self, _, version, *__: version == 4 and os.kill(os.getpid(), 15))
        assert len(train(source, tmp_path / "run", **settings)) == 5
    assert "SIGTERM: saved at step 5; the same command goes on from there" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train(source, tmp_path / "run", **settings)
    assert toys.rows(tmp_path / "run") == toys.rows(folder)


def test_a_last_step_that_could_not_be_saved_is_told_of(source, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ValueError("INTERNAL: writing: No space left on device\nSource locations:\n  file.cc:12")

    config, folder = toys.config(source, steps=2), tmp_path / "run"
    again = functools.partial(grpo.train, config, folder, quiet=True, task=toys.Low())
    again(source=source)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.ocp.CheckpointManager, "save", fail)
        with pytest.raises(ConfigError, match=r"step 3 is not saved \(No space left on device\); .*from step 2"):
            again(explicit={"steps": "3"})
    again()
    assert checkpoint.newest_step(folder) == 3


def test_it_is_shown_and_drawn(whole, tmp_path):
    folder, _ = whole
    rows, held = (toys.rows(folder, kind) for kind in ("train", "eval"))
    html = page.page(folder)
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])
    drawn = {chart["id"]: {s["name"]: s["y"] for s in chart["series"]} for chart in data["charts"]}
    assert list(drawn)[:2] == ["reward", "passed"]
    wanted = ("length", "truncated", "entropy", "kl", "zero_spread", "gap", "grad_norm", "learning_rate", "seconds")
    assert set(wanted) <= drawn.keys() and not {"loss", "heldout"} & drawn.keys()
    for chart, name, key, of in (
        ("reward", "mean reward", "reward", rows), ("reward", "accuracy", "reward_accuracy", rows),
        ("reward", "held out", "heldout_reward", held), ("passed", "pass@2", "pass_2", held),
        ("length", "longest", "length_max", rows), ("gap", "most", "gap_max", rows), ("kl", "KL", "kl", rows),
    ):  # fmt: skip
        seen = [row[key] if row[key] is None else pytest.approx(row[key], rel=1e-4) for row in of]
        assert drawn[chart][name] == seen, name
    assert [chart["log"] for chart in data["charts"] if chart["id"] == "gap"] == [True]
    assert data["layers"] == ["layer 2", "MTP 1"] and data["loads"]["steps"] == list(range(1, 9))
    for text in ("pass@1", "samples/step-000008.txt", "## answer 2: accuracy", "sampling answers to learn from"):
        assert text in html, text
    for of in (rows, held, rows[:1], held[:1], rows + held):
        with (tmp_path / "loss.png").open("wb") as file:
            picture.draw(of, file)
        assert (tmp_path / "loss.png").stat().st_size > 10_000


def test_no_text_of_an_answer_becomes_markup(whole, tmp_path):
    folder = shutil.copytree(whole[0], tmp_path / "run")
    (folder / "samples/step-000009.txt").write_text("<script>alert(1)</script>" + "x" * page.SAMPLES)
    html = page.page(folder)
    assert "&lt;script&gt;alert(1)" in html and "<script>alert(1)" not in html and "characters)" in html


def test_a_gap_of_older_weights_alone_is_no_number():
    tiles = page._policy_tiles({"reward": 0.5, "length": 3.0, "gap": None}, {})
    assert tiles[-1][:2] == ("gap", "–")


def test_a_person_is_told_what_is_done_and_where_it_is(source, tmp_path, capsys):
    train(source, tmp_path / "run", steps=1)
    said = capsys.readouterr().err
    for line in (
        "task       low, put as plain; 2 problems held out, 2 of them asked twice",
        "reward     accuracy 1, short 0.1",
        "steps      1 of 2 prompts x 8 answers of at most 6 tokens",
        "objective  r1: ratios of tokens from 0 to 11, KL 0.001 (k3) to a policy renewed every 400 steps, advantages",
        "sampling   temperature 1, its experts replayed in training, router bias at rest",
        f"starting from step 5 of {source}",
        "step 1/1: reward ",
        "step 1: held out pass@1 ",
        f"checkpoint {tmp_path / 'run/checkpoints/1'}",
        f"samples    {tmp_path / 'run/samples/step-000001.txt'}",
        f"evaluate   dsjax eval {tmp_path / 'run'} --task low --style plain --max-tokens 6",
    ):
        assert f"\n{line}" in f"\n{said}", line
    train(source, tmp_path / "run", steps=1)
    assert "1 of 1 steps are done; --steps=N gives it more" in capsys.readouterr().err


def test_it_begins_with_the_weights_of_a_run_that_keeps_their_average_and_without_a_reference(tmp_path, capsys):
    averaged = toys.source(tmp_path / "micro", ema_decay=0.9)
    (row,) = train(averaged, tmp_path / "run", steps=1, kl_weight=0.0)
    assert row["kl"] is None and "KL" not in capsys.readouterr().err.split("step 1/1")[1]
    assert "KL to the reference" not in page.page(tmp_path / "run")
    with jax.set_mesh(make_mesh(jax.devices()[:1])):
        given, _ = models.draw(toys.base(averaged).model)
    assert same(load(averaged).model, given)


# What each option does.


def test_groups_without_spread_are_replaced_and_counted(source, tmp_path, monkeypatch):
    class Even(toys.Low):
        """Of even problems all answers are worth the same."""

        weights = MappingProxyType({"accuracy": 1.0})

        def problem(self, index):
            return Problem(f"{index % 10}=", "0")

        def judge(self, problems, texts):
            worth = [{"accuracy": float(len(set(texts[:n])) % 2)} for n in range(len(texts))]
            return [{"accuracy": 1.0} if int(p.prompt[0]) % 2 == 0 else w for p, w in zip(problems, worth)]

    taken = []
    watch(monkeypatch, grpo.Run, "_groups", lambda self, found, *_: taken.append([g.number for g in found[0]]))
    for resample in (0, 1, 9):
        rows = train(source, tmp_path / str(resample), Even(), steps=2, resample=resample)
        one, two = taken[-2:]
        if resample == 0:
            assert (one, two) == ([0, 1], [2, 3]) and [row["zero_spread"] for row in rows] == [0.5, 0.5]
        if resample == 1:
            assert (one, two) == ([2, 1], [3, 5]) and [row["zero_spread"] for row in rows] == [0.5, 0]
            assert [row["resampled"] for row in rows] == [1, 1]
        if resample == 9:
            assert one[1] == 1 and one[0] == 3 and [row["zero_spread"] for row in rows] == [0, 0]
            assert rows[0]["resampled"] == 2  # problem 2, and then 3


def test_several_updates_learn_from_what_was_sampled_at_once(source, tmp_path, monkeypatch):
    learned = []
    watch(
        monkeypatch, grpo.Run, "_learn",
        lambda self, _, version, step, groups, *__: learned.append((version, step, [g.number for g in groups])),
    )  # fmt: skip
    rows = train(source, tmp_path / "run", updates=2, steps=4, reference_every=3)
    assert learned == [(0, 0, [0, 1]), (0, 1, [2, 3]), (2, 2, [4, 5]), (2, 3, [6, 7])]
    assert [row["step"] for row in rows] == [2, 4]
    assert all(row["answer_tokens"] > 16 * 5 for row in rows)  # of both updates
    with pytest.raises(ConfigError, match=r"^grpo.updates=3: expected a divisor of steps=4$"):
        train(source, tmp_path / "other", updates=3)


def test_updates_may_change_in_a_run_that_goes_on_and_its_last_step_is_saved(source, tmp_path):
    folder = tmp_path / "run"
    train(source, folder, steps=3, eval_prompts=0)
    again = functools.partial(grpo.train, toys.config(source), folder, quiet=True, task=toys.Low())
    kept = (folder / "config.json").read_text()
    with pytest.raises(ConfigError, match=r"^grpo.updates=2: .* a divisor of steps=6 less the 3 that are done$"):
        again(explicit={"grpo.updates": "2", "steps": "6"})
    assert (folder / "config.json").read_text() == kept
    again(explicit={"grpo.updates": "2", "steps": "9", "checkpoint_every": "3", "keep_checkpoints": "9"})
    assert [row["step"] for row in toys.rows(folder, "train")] == [1, 2, 3, 5, 7, 9]
    assert {int(path.name) for path in (folder / "checkpoints").iterdir()} == {2, 3, 7, 9}  # at or behind each third


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_samples": 2, "eval_temperature": 0.0}, "grpo.eval_samples=2: expected 1 with grpo.eval_temperature=0"),
        ({"ema_on": "host", "ema_decay": 0.9}, "optimizer.ema_on=host: expected device, or optimizer.ema_decay=none"),
        ({"exact": True}, "grpo.max_rows=16: has no effect in the exact mode; expected 256"),
        ({"exact": True, "updates": 2}, "grpo.replay=true: expected false with grpo.exact=true and several updates"),
        ({"exact": True, "max_staleness": 1}, "grpo.replay=true: expected false"),
        ({"keep_best": 1}, "keep_best=1: has no effect in dsjax grpo; expected 0"),
        ({"batch_size_start": 16, "batch_ramp_tokens": 9}, "batch_size_start=16: has no effect"),
        ({"on_spike": "skip"}, "faults.on_spike=skip: has no effect in dsjax grpo; expected note"),
    ],
    ids=str,
)
def test_what_could_have_no_effect_is_refused(source, changes, message):
    of = {name: changes.pop(name) for name in ("ema_on", "ema_decay", "on_spike") if name in changes}
    config = toys.config(source, **changes)
    faults = {"faults": replace(config.faults, on_spike=of.pop("on_spike"))} if "on_spike" in of else {}
    config = replace(config, optimizer=replace(config.optimizer, **of), **faults)
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        grpo.check(config)
    grpo.check(recipes.begin_with(config, "small", {"seq_len": 64}))  # what pre-training had is not taken over


def test_problems_of_a_file_are_asked_again_without_those_of_training(source, tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text("")
    for task, end in ((str(path), "--max-tokens 6 --heldout"), ("parity:8", "--max-tokens 6")):
        (row,) = [v for name, v in farewell_rows(toys.config(source, task=task), tmp_path, 1) if name == "evaluate"]
        assert row.endswith(end)


@pytest.mark.parametrize(
    "settings",
    [{}, pytest.param({"objective": "v3_2", "max_staleness": 1, "max_rows": 24}, marks=pytest.mark.slow)],
    ids=["in step", "a round behind"],
)
def test_the_ratio_can_be_to_the_trainers_own_log_probabilities(source, tmp_path, monkeypatch, settings):
    """Those of the policy that a round begins with: its first step's ratios are 1, its second's are not. What a
    sampler of older weights was apart weighs the tokens."""
    seen, apart, shared = [], [], grpo.Programs

    def watched(config):
        programs = copy.copy(shared(config))
        step = programs.gradients

        def gradients(model, bias, m, *rest):
            found = step(model, bias, m, *rest)
            seen.append(np.abs(np.asarray(found[2]) - np.asarray(m.old))[np.asarray(m.mask)].max())
            apart.append(np.abs(np.asarray(m.old) - np.asarray(m.sampler))[np.asarray(m.mask)].max())
            return found

        programs.gradients = gradients
        return programs

    monkeypatch.setattr(grpo, "Programs", watched)
    train(source, tmp_path / "run", old_policy="trainer", updates=2, eval_prompts=0, **settings)
    assert max(seen[::2]) <= 1e-6 and min(seen[1::2]) > 1e-3
    assert max(apart) > 0.01 if settings else max(apart) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("updates", [1, 2])
def test_the_policy_becomes_the_reference(source, tmp_path, monkeypatch, updates):
    replaced = {}
    watch(
        monkeypatch, grpo.Run, "_groups",
        lambda self, _, done, state: replaced.update({done: same(state.reference, state.model)}),
    )  # fmt: skip
    train(source, tmp_path / "run", steps=8, reference_every=3, updates=updates)
    expected = {0, 3, 6} if updates == 1 else {0, 4, 6}  # the first round at or behind each third step
    assert {done for done, new in replaced.items() if new} == expected


@pytest.mark.parametrize("router_bias", ["frozen", "follow"])
def test_the_router_bias_rests_or_moves(source, tmp_path, monkeypatch, router_bias):
    biases = []
    watch(monkeypatch, grpo.Run, "_groups", lambda self, _, done, state: biases.append(leaves(state.router_bias)))
    rows = train(source, tmp_path / "run", steps=2, router_bias=router_bias)
    assert same(*biases) == (router_bias == "frozen")
    assert (rows[0]["bias_update_speed"] > 0) == (router_bias == "follow")


def test_a_step_with_nan_is_skipped_told_of_and_counted(source, tmp_path, monkeypatch, capsys):
    class Mad(toys.Low):
        def judge(self, problems, texts):
            return [p | {"short": np.nan if "2" in problems[0].prompt else 0.1} for p in super().judge(problems, texts)]

    seen = []
    watch(monkeypatch, grpo.Run, "_groups", lambda self, _, done, state: seen.append(leaves(state.model)))
    rows = train(source, tmp_path / "run", Mad(), steps=3)
    assert [row["skipped"] for row in rows] == [0, 1, 1] and rows[1]["reward"] is None
    assert "step 2/3: reward NaN" in capsys.readouterr().err
    assert not same(seen[0], seen[1]) and same(seen[1], seen[2])


@pytest.mark.slow
def test_a_run_that_only_gets_nan_ends_in_one_line(source, tmp_path):
    class Mad(toys.Low):
        def judge(self, problems, texts):
            return [{"accuracy": np.nan}] * len(texts)

    with pytest.raises(ConfigError, match=r"^stopped at step 2: NaN or Inf in the loss or gradients of 2 steps in a"):
        train(source, tmp_path / "run", Mad(), max_skipped_steps=2, eval_prompts=0)


@pytest.mark.slow
def test_answers_that_are_cut_off_can_pay_or_be_left_out(source, tmp_path, monkeypatch):
    seen = []
    right = grpo.rows.rollouts

    def watched(groups, advantage, version, config):
        for arrays in right(groups, advantage, version, config):
            seen.append((groups, advantage, arrays))
            yield arrays

    monkeypatch.setattr(grpo.rows, "rollouts", watched)
    task = toys.Low()
    train(source, tmp_path / "mask", task, overlong="mask", steps=1)
    (groups, _, arrays) = seen[-1]
    answers = [a for g in groups for a in g.answers]
    assert arrays["mask"].sum() == sum(len(a.tokens) for a in answers if a.reason == "stop")
    train(source, tmp_path / "penalty", task, overlong="penalty", overlong_buffer=3, steps=1)
    (groups, advantage, arrays) = seen[-1]
    assert arrays["mask"].sum() == sum(len(a.tokens) for g in groups for a in g.answers)
    for group, got in zip(groups, advantage):
        paid = group.rewards(task.weights) + [length_penalty(len(a.tokens), 6, 3) for a in group.answers]
        np.testing.assert_allclose(got, (paid - paid.mean()) / paid.std(), atol=1e-4)
    assert [length_penalty(n, 6, 3) for n in (0, 3, 4, 6)] == [0, 0, -1 / 3, -1]


def test_where_no_reward_says_what_is_right_there_is_no_pass_at_k(source, tmp_path):
    class Style(toys.Low):
        weights = MappingProxyType({"short": 1.0})

        def judge(self, problems, texts):
            return [{"short": 1 / (1 + len(text))} for text in texts]

    train(source, tmp_path / "run", Style(), steps=1)
    row = toys.rows(tmp_path / "run", "eval")[-1]
    assert "pass_1" not in row and 0 < row["heldout_reward"] < 1


# The exact mode.


def test_the_exact_mode_has_no_gap_and_says_what_the_engine_says(source, tmp_path, monkeypatch):
    said = {}
    for exact in (True, False):
        watch(
            monkeypatch, grpo.Run, "_groups",
            lambda self, found, *_: said.setdefault(self.config.grpo.exact, []).append(
                [a.tokens for g in found[0] for a in g.answers]
            ),
        )  # fmt: skip
        rows = train(source, tmp_path / str(exact), exact=exact, steps=2, max_rows=256)
        monkeypatch.undo()
        toys.share(monkeypatch)
        if exact:
            assert [(row["gap"], row["gap_max"]) for row in rows] == [(0.0, 0.0)] * 2
    assert said[True] == said[False]


@pytest.mark.slow
def test_exact_requests_end_as_those_of_the_engine_do(source):
    config = toys.config(source)
    with jax.set_mesh(make_mesh(jax.devices()[:1])):
        model, bias = models.draw(config.model)
        mesh = jax.sharding.get_mesh()
        options = EngineConfig(max_rows=8, max_model_len=16, n_draft=0)
        found = []
        for engine in (
            ExactEngine(model, bias, mesh, config),
            Engine(Loaded(model, bias, mesh, config, source), options),
        ):
            told, ends, requests = [], [], []
            for seed in range(3):
                words = []
                told.append(words)
                requests.append(
                    Request(
                        [5 + seed, 9],
                        max_tokens=4 + seed,
                        seed=seed,
                        logprobs=0,
                        tell=lambda new, words=words: words.extend(o.token for o in new) or None,
                        done=ends.append,
                    )
                )
                engine.submit(requests[-1])
            engine.step()
            engine.cancel(requests[1].id)
            engine.run()
            assert not engine.busy
            found.append(([told[0], told[2]], sorted(ends)))
        assert found[0] == found[1]
        assert found[0][1] == ["cancelled", "length", "length"]


# Devices.


@pytest.mark.slow
def test_eight_devices_take_the_step_of_one(source, tmp_path, monkeypatch):
    states, rewards = [], []
    watch(
        monkeypatch, grpo.Run, "_round",
        lambda self, found, *_: states.append((models.named_leaves(found[0].model), found[1])),
    )  # fmt: skip
    for n, sizes in ((1, {}), (8, {"fsdp": 2, "expert": 2, "tensor": 2})):
        toys.share(monkeypatch, n)
        config = toys.config(source, steps=1, eval_prompts=0)
        mesh = replace(config.mesh, **sizes) if sizes else config.mesh
        folder = tmp_path / str(n)
        grpo.train(replace(config, mesh=mesh), folder, source=source, quiet=True, task=toys.Low())
        rewards.append([row["reward"] for row in toys.rows(folder, "train")])
    assert rewards[0] == rewards[1]
    (one, said), (eight, other) = states
    for name in ("loss", "grad_norm", "entropy", "kl", "load"):
        np.testing.assert_allclose(other[name], said[name], rtol=1e-4, atol=1e-6, err_msg=name)
    for name, value in one.items():  # Adam's first step: the gradient's sign, where it is not rounding
        np.testing.assert_allclose(eight[name], value, atol=2e-3, err_msg=name)


def test_the_chat_template_comes_with_the_model(source, tmp_path):
    talker = shutil.copytree(source, tmp_path / "talker")
    (talker / "chat_template.jinja").write_text("{{ messages[0].content }}<think>")
    task, asked = toys.Low(), []
    task.judge = lambda problems, texts: asked.extend(texts) or toys.Low.judge(task, problems, texts)
    train(talker, tmp_path / "run", task, steps=1, style="chat")
    assert all(text.startswith("<think>") for text in asked) and asked  # what the prompt has of the answer already
    assert (tmp_path / "run/chat_template.jinja").exists()


# What is wrong is one line.


class Wordy(toys.Low):
    def __init__(self, where: str):
        self.where = where

    def problem(self, index):
        return Problem("x" * (20 if self.where == "learned" else 2))

    def heldout(self):
        return [Problem("x" * (20 if self.where == "heldout" else 2))]


@pytest.mark.parametrize("where", ["learned", "heldout"])
def test_a_prompt_that_is_too_long_is_one_line(source, tmp_path, where):
    message = (
        "seq_len=16: a prompt of 21 tokens and an answer of grpo.max_tokens=6 do not fit; "
        "expected --seq-len=27 or more, or shorter prompts"
    )
    with pytest.raises(ConfigError, match=f"^{message}$"):
        train(source, tmp_path / "run", Wordy(where))


def test_an_error_of_a_judge_is_one_line(source, tmp_path):
    class Broken(toys.Low):
        def judge(self, problems, texts):
            raise KeyError("answer")

    for prompts in (0, 2):
        with pytest.raises(ConfigError, match=r"^low: judging failed: KeyError: 'answer'$"):
            train(source, tmp_path / str(prompts), Broken(), eval_prompts=prompts)
