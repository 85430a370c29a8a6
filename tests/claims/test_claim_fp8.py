"""The claim about FP8: what is compared, what it takes to hold, and what happens to trainings that stop."""

import json

import numpy as np
import pytest

import configs
from dsjax.claims import fp8, runs
from dsjax.config import ConfigError, replace

RECIPES = (fp8.BASE, fp8.CLAIMED, *fp8.CONTROLS)
CONFIG = replace(fp8.small_model(configs.load("tiny")), steps=20)


def losses(ends, seeds=2):
    """Losses that fall from 8 and end, over the last two of 20 steps, at ends[recipe] times bf16's."""
    base = np.linspace(8, 5, 20)
    return {(r, s): base * np.where(np.arange(20) < 18, 1.5, ends.get(r, 1.0)) for r in RECIPES for s in range(seeds)}


@pytest.mark.parametrize(
    ("end", "holds"), [(1.0, True), (1.0024, True), (0.9976, True), (1.0026, False), (0.997, False), (np.nan, False)]
)
def test_it_holds_within_a_quarter_of_a_percent_over_the_last_tenth_of_the_steps(end, holds):
    result = fp8.compare(losses({fp8.CLAIMED: end, "fp8_tensor": 3.0}), 2)
    assert result["holds"] is holds
    if not np.isnan(end):
        assert result["recipes"][fp8.CLAIMED]["difference"] == pytest.approx([end - 1] * 2, abs=1e-12)


def test_seeds_are_averaged():
    values = losses({})
    values[fp8.CLAIMED, 0], values[fp8.CLAIMED, 1] = 1.004 * values[fp8.BASE, 0], 0.998 * values[fp8.BASE, 1]
    result = fp8.compare(values, 2)
    assert result["holds"] and result["recipes"][fp8.CLAIMED]["mean_difference"] == pytest.approx(0.001)
    head, rows = fp8.table(result)
    assert head == ["recipe", "loss", "seed 0", "seed 1", "mean"]
    assert dict((row[0], row[2:]) for row in rows)[fp8.CLAIMED] == ("+0.400%", "-0.200%", "+0.100%")


@pytest.fixture
def trained(monkeypatch):
    """Trainings that write their losses at once, up to a step if it is given; what was trained."""
    done = []

    def train(config, run, stop=20, **_):
        done.append((config.compute.precision, config.seed))
        run.mkdir(parents=True, exist_ok=True)
        rows = [{"kind": "train", "step": i + 1, "loss": 8.0 - i / 10} for i in range(stop)]
        (run / "checkpoints" / str(stop)).mkdir(parents=True)
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    monkeypatch.setattr(runs.loop, "train", train)
    return done, train


def test_every_recipe_is_trained_from_every_seed_once(trained, tmp_path):
    done, _ = trained
    result = fp8.test(CONFIG, tmp_path, 2, print)
    assert done == [(recipe, seed) for recipe in RECIPES for seed in (0, 1)]
    assert result["holds"] and result["tokens"] == 20 * CONFIG.batch_size * CONFIG.seq_len
    assert json.loads((tmp_path / "claim.json").read_text()) == result
    assert (tmp_path / "claim.png").stat().st_size > 10_000
    fp8.test(CONFIG, tmp_path, 2, print)
    assert len(done) == 2 * len(RECIPES)  # what is trained is not trained again


def test_a_training_that_stops_ends_the_claim_and_longer_ones_are_refused(trained, tmp_path, monkeypatch):
    _, train = trained
    with monkeypatch.context() as patch:
        patch.setattr(runs.loop, "train", lambda *args, **kwargs: train(*args, **kwargs, stop=7))
        with pytest.raises(ConfigError, match="bf16-0: stopped at step 7 of 20; the same command goes on from there"):
            fp8.test(CONFIG, tmp_path, 1, print)
        assert not (tmp_path / "claim.json").exists()
    fp8.test(CONFIG, tmp_path, 1, print)
    with pytest.raises(ConfigError, match="its trainings are of steps=20, not 10; choose another --out"):
        fp8.test(replace(CONFIG, steps=10), tmp_path, 1, print)
