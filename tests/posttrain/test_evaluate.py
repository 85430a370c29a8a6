"""What a model solves of a task, against counting by hand; and a run that was ended goes on."""

import dataclasses
import itertools
import json
from collections import Counter

import models
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsjax.config import ConfigError
from dsjax.hub.load import logits
from dsjax.infer.engine import Engine
from dsjax.posttrain import evaluate as evaluation
from dsjax.posttrain.evaluate import Answer, Asking, Judged, canonical, evaluate, majority, pass_at, powers
from dsjax.posttrain.problem import Problem
from dsjax.posttrain.tasks import open_task

CFG = models.v3(num_hidden_layers=2, max_position_embeddings=64, vocab_size=264)


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets(n):
    for right, k in itertools.product(range(n + 1), range(1, n + 1)):
        samples = [True] * right + [False] * (n - right)
        subsets = list(itertools.combinations(samples, k))
        assert pass_at(k, n, right) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    with pytest.raises(ValueError, match=f"k={n + 1}: expected at most n={n}"):
        pass_at(n + 1, n, 0)


@given(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=7))
def test_majority_is_by_counting(said):
    chosen, votes = majority(said), [answer for answer in said if answer is not None]
    most = max(map(votes.count, votes), default=0)
    first = [i for i, answer in enumerate(said) if answer is not None and said.count(answer) == most]
    assert chosen == (first[0] if first else None)


@given(st.lists(st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=4, max_size=4), min_size=2, max_size=3))
def test_shares_are_those_of_all_draws(rows):
    judged = [[Judged(right, 9.0, form, str(right), -i) for i, (right, form) in enumerate(row)] for row in rows]
    shares = evaluation._shares(judged, "reward")
    assert shares["pass@1"] == pytest.approx(np.mean([[right for right, _ in row] for row in rows]))
    assert shares["pass@4"] == np.mean([any(right for right, _ in row) for row in rows])
    ahead = [Counter(right for right, _ in row) for row in rows]
    assert shares["maj@4"] == np.mean(
        [c[True] > c[False] or (c[True] == 2 and row[0][0]) for c, row in zip(ahead, rows)]
    )
    best = [max(range(4), key=lambda i: (row[i][1], -i)) for row in rows]
    assert shares["best@4_by_reward"] == np.mean([row[i][0] for i, row in zip(best, rows)])
    silent = [[one._replace(said=None) for one in row] for row in judged]
    assert {name for name in shares if name not in evaluation._shares(silent, "reward")} == {"maj@2", "maj@4"}
    assert evaluation._shares(judged, "logprob")["best@4_by_logprob"] == np.mean([row[0][0] for row in rows])


def test_answers_are_counted_in_one_form():
    assert canonical("0.50") == canonical(r"\frac{1}{2}") == canonical("50%") == "1/2" and canonical(" Ab ") == "ab"
    assert canonical(None) is canonical("") is canonical("$$") is None
    assert powers(1) == [1] and powers(12) == [1, 2, 4, 8, 12] and powers(16) == [1, 2, 4, 8, 16]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return models.of_bytes(folder, CFG)


class Letters:
    """A task that random texts solve now and then: the first letter is of the lower half."""

    name, weights = "letters", {"accuracy": 1.0, "format": 0.5}

    def problem(self, index):
        return PROBLEMS[index % 3]

    def heldout(self):
        return []

    def judge(self, problems, texts):
        return [{"accuracy": float(t[:1] < "@"), "format": float(len(t) > 4)} for t in texts]

    def answer(self, problem, text):
        return text[:1]


PROBLEMS = [Problem(f"{i}?") for i in range(3)]
ASKING = Asking(samples=4, temperature=1.0, top_p=1.0, max_tokens=6, seed=3)


def read(path):
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def test_a_run_that_was_ended_goes_on(loaded, tmp_path, monkeypatch):
    whole, out, said = tmp_path / "whole.jsonl", tmp_path / "out.jsonl", []
    result = evaluate(loaded, Letters(), PROBLEMS, ASKING, out=whole, max_rows=4)
    head, *rows = read(whole)
    assert head["asked"]["samples"] == 4 and head["asked"]["task"] == "letters"
    assert head["asked"]["precision"] == loaded.config.compute.precision
    assert [(r["problem"], r["sample"]) for r in rows] == list(itertools.product(range(3), range(4)))
    right = np.array([r["rewards"]["accuracy"] for r in rows])
    assert result["pass@1"] == result["reward_accuracy"] == right.mean() and 0 < right.mean() < 1
    assert result["tokens"] == np.mean([r["n_tokens"] for r in rows]) and result["problems"] == 3
    assert result["truncated"] == np.mean([r["reason"] == "length" for r in rows]) and result["samples"] == 4
    assert result["reward"] == pytest.approx(right.mean() + 0.5 * result["reward_format"])

    step, n = Engine.step, 0

    def killed(self):
        nonlocal n
        n += 1
        if n == 9:  # some are done by now
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(Engine, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(loaded, Letters(), PROBLEMS, ASKING, out=out, max_rows=4)
    monkeypatch.setattr(Engine, "step", step)
    n_done = len(read(out)) - 1
    assert 0 < n_done < 12
    with out.open("a") as file:
        file.write('{"problem": 2, "sam')  # cut off
    assert evaluate(loaded, Letters(), PROBLEMS, ASKING, out=out, max_rows=4, say=said.append) == result
    assert said == [f"{out}: {n_done} answers are there already; {12 - n_done} are left"]
    for mine, theirs in zip(read(out), read(whole), strict=True):
        assert mine.pop("logprob", 0) == pytest.approx(theirs.pop("logprob", 0), abs=1e-5) and mine == theirs
    monkeypatch.setattr(Engine, "step", killed)  # nothing is left to ask
    assert evaluate(loaded, Letters(), PROBLEMS, ASKING, out=out, say=said.append) == result
    for changed, message in (
        ({"asking": Asking(samples=4)}, "its answers are of temperature=1.0, and now it is 0.6; expected a new file"),
        ({"label": "other"}, "its answers are of model='', and now it is other"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluate(loaded, Letters(), PROBLEMS, **{"asking": ASKING, "out": out} | changed)
    older = {name: value for name, value in head["asked"].items() if name != "seeds"}
    out.write_text(json.dumps({"asked": older}) + "\n")
    with pytest.raises(ConfigError, match="its answers are of seeds=none, and now it is sha256"):
        evaluate(loaded, Letters(), PROBLEMS, ASKING, out=out)


@pytest.mark.parametrize("text", ['{"line": 1}\n', "my notes", "my notes\n", '{"asked": {}}\nnotes\n', "\n", "{"])
def test_a_file_of_something_else_is_not_touched(loaded, tmp_path, text):
    out = tmp_path / "out.jsonl"
    out.write_text(text)
    with pytest.raises(ConfigError, match="not one that this command wrote"):
        evaluate(loaded, Letters(), PROBLEMS, ASKING, out=out)
    assert out.read_text() == text


def test_answers_hold_any_character(tmp_path):
    path, head, said = tmp_path / "out.jsonl", {"model": "m"}, []
    answer = Answer(0, 0, "one\u2028two\x85three\x0bfour\r\n", "stop", 3, -1.0)
    kept = evaluation._Kept(path, head, said.append)
    kept.add(answer)
    assert evaluation._Kept(path, head, said.append).answers() == {(0, 0): answer}
    path.write_text('{"asked": {"mod')  # its first line was cut off
    assert evaluation._Kept(path, head, said.append).answers() == {}


def test_seeds_of_one_run_are_not_those_of_the_next(loaded, monkeypatch):
    seeds = []
    monkeypatch.setattr(Engine, "submit", lambda self, request: seeds.append(request.seed) or request.done("stop"))
    monkeypatch.setattr(Engine, "run", lambda self: None)
    for seed in range(3):
        with pytest.warns(RuntimeWarning):  # the mean of no tokens
            evaluate(loaded, Letters(), PROBLEMS, dataclasses.replace(ASKING, seed=seed))
    assert len(set(seeds)) == len(seeds) == 36


class Worthless(Letters):
    name, weights = "worthless", {"accuracy": 1.0}


def test_the_best_is_not_chosen_by_the_answer_key(loaded):
    result = evaluate(loaded, Letters(), PROBLEMS, ASKING, max_rows=4)
    assert "best@4_by_logprob" in result and "best@4_by_reward" not in result
    assert "best@4_by_reward" in evaluate(loaded, Letters(), PROBLEMS, ASKING, best_by="reward", max_rows=4)
    with pytest.raises(ConfigError, match="best_by=reward: expected logprob: each of accuracy needs the answer"):
        evaluate(loaded, Worthless(), PROBLEMS, ASKING, best_by="reward")


def test_greedy_answers_are_the_likeliest_tokens(loaded, tmp_path):
    out, tokenizer = tmp_path / "out.jsonl", loaded.tokenizer
    result = evaluate(loaded, Letters(), PROBLEMS[:1], Asking(samples=1, temperature=0.0, max_tokens=3), out=out)
    assert set(result) >= {"pass@1", "tokens"} and not any(name.startswith(("maj", "best")) for name in result)
    ids, logp = [tokenizer.bos_id, *tokenizer.encode("0?")], []
    for _ in range(3):
        scores = logits(loaded, [ids])[0, -1].astype(np.float64)
        ids.append(int(scores.argmax()))
        logp.append(scores.max() - np.log(np.exp(scores).sum()))
        if ids[-1] in tokenizer.eos_ids:
            break
    row = read(out)[1]
    assert row["text"] == tokenizer.decode([i for i in ids[3:] if i not in tokenizer.eos_ids])
    assert row["logprob"] == pytest.approx(np.mean(logp), abs=1e-4) and row["n_tokens"] == len(logp)


def test_a_task_is_evaluated_from_end_to_end(loaded):
    with open_task("parity:8") as task:
        problems = task.heldout()[:4]
        result = evaluate(loaded, task, problems, Asking(samples=2, max_tokens=3), best_by="logprob")
        assert result["task"] == "parity:8" and 0 <= result["best@2_by_logprob"] <= result["pass@2"] <= 1


def test_what_cannot_be_evaluated(loaded):
    with pytest.raises(ConfigError, match="samples=2: expected 1 with temperature=0"):
        Asking(samples=2, temperature=0.0)
    for problems, options, message in (
        (
            [Problem("x", facts={"rewards": ["format"]})],
            {},
            "rewards=format: problem 0: expected one of accuracy, choice",
        ),
        ([], {}, "letters: no problems to ask"),
        ([Problem("x" * 63)], {}, "problem 0: 64 tokens; expected at most 63"),
        (PROBLEMS, {"best_by": "logprobs"}, "best_by=logprobs: expected reward or logprob; the nearest is logprob"),
        (PROBLEMS, {"asking": Asking(style="chat")}, "no chat template"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluate(loaded, Letters(), problems, **options)
