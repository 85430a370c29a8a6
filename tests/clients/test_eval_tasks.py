"""lm-eval's tasks of a folder, run on the engine in this process: `dsjax eval RUN --tasks`."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import runs
from click.testing import CliRunner

from dsjax.cli import cli
from dsjax.config import ConfigError

pytest.importorskip("lm_eval")

from dsjax.posttrain.lm import EngineLM, rows, run_tasks

TASKS = Path(__file__).parent / "tasks"
DOCS = json.loads((TASKS / "docs.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """The data are read where their YAML says, and nowhere else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(TASKS.parents[2])
        for name, value in {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}.items():
            patch.setenv(name, value)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def results(loaded):
    return run_tasks(loaded, ["choice", "rolling", "text"], TASKS, max_rows=4)


def asked(results, task):
    return sorted(results["samples"][task], key=lambda sample: sample["doc_id"])


def test_loglikelihoods_are_the_forward_passes(results, loaded, logprobs):
    begin, right = [loaded.tokenizer.bos_id], []
    for doc, sample in zip(DOCS, asked(results, "choice"), strict=True):
        scores = []
        for choice, [(got, likeliest)] in zip(doc["choices"], sample["resps"]):
            n, whole = len(begin + loaded.tokenizer.encode(doc["begin"])), doc["begin"] + choice
            whole = begin + loaded.tokenizer.encode(whole)
            scores.append(logprobs(whole)[n - 1 :].sum())
            np.testing.assert_allclose(got, scores[-1], atol=2e-3)
            assert likeliest == (doc["begin"] != "Zebra? Say" and choice == doc["choices"][0])
        right.append(np.argmax(scores) == 0)
    assert results["results"]["choice"]["acc,none"] == pytest.approx(np.mean(right)) and right[:2] == [True, True]


def test_the_loglikelihood_of_whole_texts(results, loaded, logprobs):
    want = [logprobs([loaded.tokenizer.bos_id, *loaded.tokenizer.encode(doc["begin"])]).sum() for doc in DOCS]
    np.testing.assert_allclose([s["resps"][0][0] for s in asked(results, "rolling")], want, atol=2e-3)


def test_a_text_longer_than_the_model_is_read_in_windows(loaded, logprobs):
    from lm_eval.api.instance import Instance

    model = EngineLM(loaded)
    model.longest = 34
    text = " ".join(doc["begin"] for doc in DOCS * 2)
    tokens = loaded.tokenizer.encode(text)
    (got,) = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    n, last = len(tokens), len(tokens) % 32
    want = logprobs([loaded.tokenizer.bos_id, *tokens[:32]]).sum()
    want += logprobs(tokens[31:64]).sum() + logprobs(tokens[n - 33 :])[-last:].sum()  # a last one reads more
    assert 64 < n < 96 and got == pytest.approx(want, abs=5e-3)


def test_what_the_model_writes_is_scored(results, loaded):
    talk = run_tasks(loaded, ["talk"], TASKS, chat=True)
    for got, task, want in (
        (results, "text", [" there.", " rains in Oslo."]),
        (talk, "talk", ["Hello there.", "It rains in Oslo."]),
    ):
        assert [sample["resps"][0][0] for sample in asked(got, task)][:2] == want
        assert got["results"][task]["exact_match,none"] == pytest.approx(2 / 3)
    table = {(task, metric): value for task, metric, _, value, _ in rows(results)}
    assert set(table) == {("choice", "acc"), ("rolling", "bits_per_byte"), ("text", "exact_match")}


def test_samples_are_voted_on(loaded):
    found = run_tasks(loaded, ["vote"], TASKS, samples=5, sampling={"temperature": 1.5}, seed=1)
    samples = [sample for sample in found["samples"]["vote"] if sample["filter"] == "majority"]
    said = [[text for [*texts] in sample["resps"] for text in texts] for sample in samples]
    assert all(len(texts) == 5 for texts in said) and len(set(said[2])) > 1
    votes = [Counter(texts).most_common(1)[0][0] for texts in said]
    assert [sample["filtered_resps"][0] for sample in samples] == votes
    right = [vote == doc["choices"][0] for vote, doc in zip(votes, DOCS)]
    assert found["results"]["vote"]["exact_match,majority"] == pytest.approx(np.mean(right))
    again = run_tasks(loaded, ["vote"], TASKS, samples=5, sampling={"temperature": 1.5}, seed=1)
    assert again["results"] == found["results"]


def test_the_command(taught, results, tmp_path):
    out = tmp_path / "out.jsonl"
    args = ["eval", str(taught), "--tasks=choice", f"--include-path={TASKS}", "--json", f"--out={out}"]
    done = CliRunner().invoke(cli, args, catch_exceptions=False)
    assert json.loads(done.stdout)["choice"]["acc,none"] == results["results"]["choice"]["acc,none"]
    assert [json.loads(line)["task"] for line in out.read_text().splitlines()] == ["choice"] * 3
    missing = tmp_path / "no" / "out.jsonl"
    refused = CliRunner().invoke(cli, [*args[:4], f"--out={missing}"])
    assert refused.exit_code and "expected a file in a folder that is there" in refused.output
    done = CliRunner().invoke(cli, args[:4], catch_exceptions=False)
    assert done.stdout.split("\n")[0].split() == ["task", "metric", "filter", "value", "error"]
    for args, message in (
        (["--tasks=choices", f"--include-path={TASKS}"], "tasks=choices: no such task; the nearest is choice"),
        (["--tasks=choice", "--include-path=nowhere"], "include_path=nowhere: no such folder"),
    ):
        refused = runs.dsjax("eval", taught, *args, env=runs.environment(taught.parent / "compiled"))
        assert refused.returncode == 2 and f"dsjax: {message}" in refused.stderr


def test_a_long_answer_leaves_the_prompt_alone(loaded, monkeypatch):
    from lm_eval.api.instance import Instance

    model, asked = EngineLM(loaded), []
    monkeypatch.setattr(model, "_run", lambda requests, what: asked.extend(requests))
    for context, n in (("short", 10_000), ("short", 7), ("x" * 10_000, 7)):
        model.generate_until([Instance("generate_until", {}, (context, {"max_gen_toks": n}), 0)])
    short = [loaded.tokenizer.bos_id, *loaded.tokenizer.encode("short")]
    assert asked[0].prompt == asked[1].prompt == short and asked[1].max_tokens == 7
    assert asked[0].max_tokens == model.longest - len(short)
    assert (len(asked[2].prompt), asked[2].max_tokens) == (model.longest - 1, 1)


def test_top_p_alone_leaves_a_greedy_task_greedy(loaded, monkeypatch):
    asked, run = [], EngineLM._run
    monkeypatch.setattr(
        EngineLM, "_run", lambda self, requests, what: asked.extend(requests) or run(self, requests, what)
    )
    run_tasks(loaded, ["text"], TASKS, sampling={"top_p": 0.5}, limit=1)
    run_tasks(loaded, ["text"], TASKS, sampling={"top_p": 0.5, "temperature": 0.5}, limit=1)
    assert [one.temperature for one in asked] == [0, 0.5]


def test_what_a_task_may_ask_for(loaded):
    from lm_eval.api.instance import Instance

    model = EngineLM(loaded)
    with pytest.raises(ConfigError, match="generation_kwargs: num_beams=4: expected until"):
        model.generate_until([Instance("generate_until", {}, ("x", {"num_beams": 4}), 0)])
    with pytest.raises(ConfigError, match="chat=false: expected true for messages"):
        model.apply_chat_template([{"role": "user", "content": "x"}])
    assert model.loglikelihood([]) == [] and model.generate_until([]) == []
