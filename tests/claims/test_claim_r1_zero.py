"""The claim of R1-Zero: what its texts teach and keep apart, controls, what holds, and one small run of all of it."""

import json

import jax
import pytest

from dsjax.claims import r1_zero as claim
from dsjax.config import ConfigError, override, replace
from dsjax.posttrain.parity import is_heldout, parity, parity_chain, parity_short
from dsjax.train import layout, metrics


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_few_documents_have_a_chain_and_none_what_is_held_out(tmp_path, share):
    path = claim.write_texts(tmp_path, 2000, chain_share=share, seed=3)
    asked = [json.loads(line)["text"].partition("=") for line in path.read_text().splitlines()]
    assert len(asked) == 2000 and not any(is_heldout(bits) for bits, _, _ in asked)
    assert all(answer in (parity_chain(bits), parity_short(bits)) for bits, _, answer in asked)
    assert sum(len(answer) > 1 for _, _, answer in asked) / 2000 == pytest.approx(share, abs=0.02)
    assert path.read_bytes() == claim.write_texts(tmp_path / "again", 2000, chain_share=share, seed=3).read_bytes()
    assert path.read_bytes() != claim.write_texts(tmp_path / "other", 2000, chain_share=share, seed=4).read_bytes()


def test_shuffled_rewards_are_the_groups_own_and_say_nothing_of_its_answers():
    task, right = claim.Shuffled(24, 1), claim.Parity(24, 1)
    both = right_ones = 0
    for index in range(200):
        problem = task.problem(index)
        assert problem == right.problem(index)
        answers = [problem.answer] * 4 + ["e" if problem.answer == "o" else "o"] * 4
        given = [judged["accuracy"] for judged in task.judge([problem] * 8, answers)]
        assert given == [judged["accuracy"] for judged in task.judge([problem] * 8, answers)]
        assert sum(given) == 4
        both, right_ones = both + sum(given[:4]), right_ones + 4
    assert both / right_ones == pytest.approx(0.5, abs=0.05)
    held = task.heldout()  # an evaluation asks many, and is told the truth
    assert task.judge(held, [problem.answer for problem in held]) == [{"accuracy": 1.0}] * len(held)


def of_seed(end=1.0, length=(2.0, 26.0), before=0.5, middle=0.5, half_way=0.5, **controls):
    def curve(*accuracy, length=(2.0, 2.0, 2.0)):
        return {
            "at": [0, 30, 60],
            "accuracy": list(accuracy),
            "length": list(length),
            "reward": [],
            "answer_length": [],
        }

    ends = {"more": 0.5, "shuffled": 0.5, "no_chain": 0.5} | controls
    longer = (length[0], length[0] + (middle - before) / (end - before or 1) * (length[1] - length[0]), length[1])
    said = {"mean_length": 1.0, "chain_share": 0.1}
    return {
        "before": {"accuracy": before, **said},
        "before_sampled": {"accuracy": before, **said},
        "more": {"accuracy": ends["more"], **said},
        "curves": {
            "rl": curve(before, middle, end, length=longer),
            "shuffled": curve(0.5, half_way, ends["shuffled"]),
            "no_chain": curve(0.5, 0.5, ends["no_chain"]),
        },
    }


GOOD, POOR = of_seed(middle=0.8), of_seed(end=0.75)


@pytest.mark.parametrize(
    "seeds, holds",
    [
        ([GOOD, GOOD, POOR], True),
        ([GOOD, POOR, POOR], False),
        ([GOOD], True),
        ([of_seed(end=0.94)], False),
        ([of_seed(before=0.7)], False),  # nothing to find
        ([of_seed(length=(20.0, 26.0))], False),  # chains were there before
        ([of_seed(length=(26.0, 2.0))], False),
        ([GOOD, GOOD, of_seed(more=0.8)], False),  # a control that learns, in any seed
        ([GOOD, GOOD, of_seed(shuffled=0.3)], False),
        ([GOOD, GOOD, of_seed(no_chain=0.65)], False),
        ([GOOD, GOOD, of_seed(half_way=0.9)], False),
    ],
)
def test_it_holds_where_most_learn_and_no_control_does(seeds, holds, tmp_path):
    result = claim.compare(dict(enumerate(seeds)))
    assert result["holds"] is holds
    head, rows = claim.table(result)
    assert len(rows) == len(seeds) and {len(row) for row in rows} == {len(head)}
    if seeds[0] is GOOD:
        assert rows[0] == ("0", "50.0%", "10.0%", "100.0%", "2.0 to 26.0", "50.0%", "50.0%", "50.0%")
    claim.draw(result["seeds"], tmp_path / "claim.png")
    assert (tmp_path / "claim.png").stat().st_size > 10_000


def test_accuracy_that_rises_without_length_is_no_long_answer():
    seed = of_seed()
    seed["curves"]["rl"] |= {"accuracy": [0.5, 1.0, 1.0, 1.0], "length": [2.0, 2.0, 2.0, 5.0]}
    result = claim.compare({0: seed})
    assert result["seeds"][0]["solved"] and result["seeds"][0]["together"] < 0.5 and not result["holds"]


def test_reinforcement_rewards_the_outcome_alone():
    config = claim.rl_model(claim.base_model(3), 60)
    assert config.grpo.task == "parity:24" and not config.grpo.rewards
    assert claim.Parity(24).weights == {"accuracy": 1.0}
    assert config.grpo.max_tokens >= len(parity_chain("0" * 24)) + 1  # and the end
    assert config.seed == 3 and config.steps == 60
    assert parity("0" * 23 + "1") == "o"


@pytest.mark.slow
def test_all_of_it_in_small(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "devices", lambda: jax.devices()[:1])
    monkeypatch.setattr(metrics.Recorder, "draw", lambda *_, **__: None)
    monkeypatch.setattr(claim, "ANSWERS", 16)
    accuracy, rl_model = claim.held_out_accuracy, claim.rl_model
    monkeypatch.setattr(claim, "held_out_accuracy", lambda loaded, n=8, **more: accuracy(loaded, 8, **more))
    monkeypatch.setattr(claim, "rl_model", lambda *args: override(rl_model(*args), {"grpo.eval_prompts": "8"}))
    config = replace(claim.base_model(7, steps=4), batch_size=8)
    result = claim.test(config, 1, 2, tmp_path, print)
    assert json.loads(json.dumps(result)) == json.loads((tmp_path / "claim.json").read_text())
    assert list(result["seeds"]) == [7] and result["holds"] is False
    assert result["seeds"][7]["curves"]["rl"]["at"] == [0, 2]
    again = claim.test(config, 1, 2, tmp_path, print)
    assert again["seeds"] == result["seeds"]
    for changed, steps in ((replace(config, steps=5), 2), (config, 3)):
        with pytest.raises(ConfigError, match="choose another --out"):
            claim.test(changed, 1, steps, tmp_path, print)
