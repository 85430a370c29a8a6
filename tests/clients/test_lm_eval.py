"""lm-eval, as its users run it: tasks on local files, and the numbers that it gets from the server."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from talks import NAME, WEATHER, asked

pytest.importorskip("lm_eval")

RAIN = f"{WEATHER}\ntool: rain"
DOCS = [  # two of what was taught, and one of neither
    {"question": "Hello", "begin": f"{asked('Hello')}Hello", "choices": [" there.", " rains in Oslo.", " there!"]},
    {"question": RAIN, "begin": f"{asked(RAIN)}It", "choices": [" rains in Oslo.", " is 2.", " there."]},
    {"question": "Zebra?", "begin": "Zebra? Say", "choices": [" hello.", " two", " Oslo, naïve 日本"]},
]
COMMON = """\
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
target_delimiter: ""
"""
TASKS = {
    "choice": """\
output_type: multiple_choice
doc_to_text: "{{begin}}"
doc_to_choice: choices
doc_to_target: 0
metric_list: [{metric: acc}]
""",
    "rolling": """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{begin}}"
metric_list: [{metric: bits_per_byte}]
""",
    "text": """\
output_type: generate_until
doc_to_text: "{{begin}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 20}
metric_list: [{metric: exact_match}]
""",
    "talk": """\
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{begin.split('\\n')[-1]}}{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 60}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def evaluate(url, tmp_path_factory):
    """Runs lm-eval on tasks; gives its results and its samples by task."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    for task, text in TASKS.items():
        (folder / f"{task}.yaml").write_text(COMMON.format(task=task, data=data) + text)

    def run(model: str, path: str, tasks: str, *options: str, **args):
        given = {"model": NAME, "base_url": url + path, "max_retries": 1, "max_length": 512} | args
        command = [sys.executable, "-m", "lm_eval", "--model", model, "--tasks", tasks, "--include_path", folder]
        command += ["--model_args", ",".join(f"{k}={v}" for k, v in given.items()), "--log_samples"]
        out = tmp_path_factory.mktemp("out")
        command += ["--output_path", out, *options]
        offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
        done = subprocess.run(
            [str(part) for part in command],
            env=os.environ | offline | {"OPENAI_API_KEY": "key"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        (result,) = out.rglob("results_*.json")
        samples = {}
        for task in tasks.split(","):
            (file,) = out.rglob(f"samples_{task}_*.jsonl")
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            samples[task] = sorted(rows, key=lambda row: row["doc_id"])
        return json.loads(result.read_text())["results"], samples

    return run


@pytest.fixture(scope="module")
def by_ids(evaluate, loaded):
    """Three tasks in one run, which sends token ids and begins whole texts as documents begin."""
    options = {"auth_token": "key", "custom_prefix_token_id": loaded.tokenizer.bos_id}
    return evaluate("local-completions", "/v1/completions", "choice,rolling,text", **options)


def check_choices(results, samples, loaded, logprobs, begin: list[int]):
    """begin: tokens before each prompt."""
    encode = loaded.tokenizer.encode
    assert len(samples["choice"]) == len(DOCS)
    right = []
    for doc, sample in zip(DOCS, samples["choice"]):
        scores = []
        for choice, [[got, _]] in zip(doc["choices"], sample["resps"]):
            whole, n = begin + encode(doc["begin"] + choice), len(begin + encode(doc["begin"]))
            scores.append(logprobs(whole)[n - 1 :].sum())
            np.testing.assert_allclose(float(got), scores[-1], atol=2e-3)
        right.append(np.argmax(scores) == 0)
        assert sample["acc"] == right[-1]
    assert results["choice"]["acc,none"] == pytest.approx(np.mean(right)) and right[:2] == [True, True]


def test_loglikelihoods_are_the_forward_passes(by_ids, loaded, logprobs):
    check_choices(*by_ids, loaded, logprobs, [])


def test_texts_begin_as_documents_do(evaluate, loaded, logprobs):
    options = {"tokenized_requests": False, "num_concurrent": 4, "auth_token": "key"}
    got = evaluate("local-completions", "/v1/completions", "choice", **options)
    check_choices(*got, loaded, logprobs, [loaded.tokenizer.bos_id])


def test_the_loglikelihood_of_whole_texts(by_ids, loaded, logprobs):
    (results, samples), tokenizer = by_ids, loaded.tokenizer
    want = [logprobs([tokenizer.bos_id, *tokenizer.encode(doc["begin"])]).sum() for doc in DOCS]
    np.testing.assert_allclose([float(s["resps"][0][0]) for s in samples["rolling"]], want, atol=2e-3)
    n_bytes = sum(len(doc["begin"].encode()) for doc in DOCS)
    assert results["rolling"]["bits_per_byte,none"] == pytest.approx(-np.sum(want) / n_bytes / np.log(2), rel=1e-3)


def test_what_the_model_writes_is_scored(by_ids, evaluate):
    talk = evaluate("local-chat-completions", "/v1/chat/completions", "talk", "--apply_chat_template")
    for (results, samples), task, want in (
        (by_ids, "text", [" there.", " rains in Oslo."]),
        (talk, "talk", ["Hello there.", "It rains in Oslo."]),
    ):
        assert [s["resps"][0][0] for s in samples[task]][:2] == want
        assert results[task]["exact_match,none"] == pytest.approx(2 / 3)
