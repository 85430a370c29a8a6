"""The claim of R1's pipeline: what its texts teach and keep apart, what holds, and one small run of all of it."""

import json
import random

import pytest

from dsjax.claims import r1_pipeline as claim
from dsjax.config import ConfigError, replace
from dsjax.posttrain.parity import is_heldout, parity
from dsjax.posttrain.rewards.format import format_reward
from dsjax.posttrain.rewards.language import language_reward, words_by_script
from dsjax.posttrain.stages import parse


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_nothing_held_out_is_learned_and_chains_mix_two_scripts(tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "DOCUMENTS", 2000)
    text = claim.write_texts(tmp_path / "a", seed=3)
    for name in ("base", "cold_start", "reasoning", "general", "general_problems"):
        for record in records(text / f"{name}.jsonl"):
            asked = (record.get("text") or record["prompt"]).partition("=")[0].partition(">")[0]
            assert not is_heldout(asked), name
    for name in ("reasoning_heldout", "general_heldout"):
        assert all(is_heldout(record["prompt"][:-1]) for record in records(text / f"{name}.jsonl"))
    cold = records(text / "cold_start.jsonl")
    assert all(format_reward(record["completion"]) == 1 for record in cold)
    assert all(record["completion"].endswith(f"<answer>{parity(record['prompt'][:-1])}</answer>") for record in cold)
    shares = [language_reward(record["completion"]) for record in cold]
    assert 0.4 < sum(shares) / len(shares) < 0.6
    scripts = [len(words_by_script(record["completion"].partition("</think>")[0][len("<think>") :])) for record in cold]
    assert scripts.count(2) > len(cold) / 2
    again = claim.write_texts(tmp_path / "b", seed=3)
    assert all(path.read_bytes() == (again / path.name).read_bytes() for path in text.glob("*.jsonl"))


def test_a_letter_and_a_tag_are_a_token_each():
    tokenizer = claim.tokenizer()
    text = claim.thought("0110101011010110", random.Random(0))
    ids = tokenizer.encode(f"0110>{text}")
    assert tokenizer.decode(ids) == f"0110>{text}" and tokenizer.encode_rendered(f"0110>{text}") == ids
    assert len(ids) == 5 + 16 + 4 + 1 and max(ids) < tokenizer.vocab_size == len(claim.vocabulary())
    assert all(token in claim.vocabulary() for token in claim.LETTERS)


def test_its_recipe_is_r1s_with_one_stage_beside_it(tmp_path):
    recipe = parse(claim.recipe(tmp_path, tmp_path, seed=1, rl_steps=30), "recipe.toml")
    assert [(stage.name, stage.kind, stage.source) for stage in recipe.stages] == [
        ("cold_start", "sft", "base"),
        ("reasoning_rl", "grpo", "cold_start"),
        ("without_language", "grpo", "cold_start"),
        ("rejection_sampling", "traces", "reasoning_rl"),
        ("sft", "sft", "base"),
        ("rl", "grpo", "sft"),
    ]
    one, other = (dict(stage.given) for stage in recipe.stages[1:3])
    assert {name for name in one if one[name] != other[name]} == {"name", "rewards"}
    assert all(stage.changes["seed"] == 1 for stage in recipe.stages if stage.kind != "traces")


def measured(right, language, general):
    return {
        "reasoning": {"pass@1": right, "language": language, "format": 1, "tokens": 9, "error": 0},
        "general": {"pass@1": general, "language": None, "format": 0, "tokens": 9, "error": 0},
    }


GOOD = {
    "base": (0.52, 0.5, 1.0),
    "reasoning_rl": (0.99, 0.99, 0.7),
    "without_language": (0.99, 0.6, 0.9),
    "rl": (0.97, 0.98, 0.95),
}


@pytest.mark.parametrize(
    "stage, values, holds",
    [
        ("base", (0.52, None, 1.0), True),
        ("base", (0.7, 0.5, 1.0), False),
        ("rl", (0.94, 1.0, 1.0), False),
        ("rl", (1.0, 0.9, 1.0), False),
        ("rl", (1.0, 1.0, 0.89), False),
        ("reasoning_rl", (1.0, 0.94, 1.0), False),
        ("without_language", (1.0, 0.85, 1.0), False),
    ],
)
def test_it_holds_where_every_part_does(stage, values, holds):
    found = {name: measured(*of) for name, of in (GOOD | {stage: values}).items()}
    result = claim.compare({"measured": found})
    assert result["holds"] is holds and result["learned"]
    assert sum(not found for found in result["found"].values()) == (not holds)


def test_a_base_without_the_general_task_tests_nothing():
    found = {name: measured(*of) for name, of in (GOOD | {"base": (0.5, 0.5, 0.5)}).items()}
    result = claim.compare({"measured": found})
    assert result["learned"] is result["holds"] is False


def test_a_claim_that_was_stopped_goes_on_and_says_what_came_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "DOCUMENTS", 200)
    trained = []

    def train(config, run, **_):
        trained.append(config)
        (run / "checkpoints" / "30").mkdir(parents=True)

    given = {"name": "rl", "kind": "grpo", "from": "base"}
    pipeline = {
        "base": {"run": "base", "step": 30},
        "stages": [{"given": given, "steps": 2}],
        "measured": {name: measured(*of) for name, of in GOOD.items()},
    }
    done = iter([False, True, True])
    monkeypatch.setattr(claim.runs.loop, "train", train)
    monkeypatch.setattr(claim.r1, "run", lambda *_, **__: {**pipeline, "done": next(done)})
    config = replace(claim.base_model(seed=4), steps=30)
    with pytest.raises(ConfigError, match="run: stopped; the same command goes on from there"):
        claim.test(config, 2, tmp_path, print)
    result = claim.test(config, 2, tmp_path, print)
    assert result["holds"] and json.loads((tmp_path / "claim.json").read_text()) == result
    assert result["seed"] == 4 and "--seed=4 --steps=30 --rl-steps=2" in result["command"]
    assert (tmp_path / "claim.png").stat().st_size > 10_000 and len(trained) == 1
    assert claim.table(result)[1][-1][:3] == ("rl", "grpo", "2 steps")
    with pytest.raises(ConfigError, match="its trainings are of steps=30, not 20; choose another --out"):
        claim.test(replace(config, steps=20), 2, tmp_path, print)
