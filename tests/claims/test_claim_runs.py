"""A training of a claim is done when its last step is saved."""

import pytest

from dsjax.claims import r1_zero, runs
from dsjax.config import ConfigError, replace


def test_a_training_that_was_killed_before_its_last_step_was_saved_goes_on(tmp_path, monkeypatch):
    run, trained = tmp_path / "base", []
    (run / "checkpoints" / "20").mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 30}\n')

    def train(config, run, **options):
        trained.append(options)
        (run / "checkpoints" / "30").mkdir()

    monkeypatch.setattr(runs.loop, "train", train)
    config = replace(r1_zero.base_model(), steps=30)
    for _ in range(2):
        assert runs.pretrained(config, run, None, print) == run
    assert [options["explicit"] for options in trained] == [{"steps": 30}]
    for steps, hint in ((20, "choose another --out"), (40, "the same command goes on from there")):
        with pytest.raises(ConfigError, match=f"base: stopped at step 30 of {steps}; {hint}"):
            runs.whole(run, steps)


def test_a_folder_keeps_to_one_setting(tmp_path):
    config, out = r1_zero.base_model(), tmp_path / "out"
    for _ in range(2):
        runs.only_of(out, config, rl_steps=60)
    wider = replace(config, model=replace(config.model, hidden_size=128))
    for other, changes, message in (
        (wider, {"rl_steps": 60}, "model.hidden_size=64, not 128"),
        (replace(config, seed=1), {"rl_steps": 60}, "seed=0, not 1"),
        (config, {"rl_steps": 90}, "rl_steps=60, not 90"),
    ):
        with pytest.raises(ConfigError, match=f"out: its trainings are of {message}; choose another --out"):
            runs.only_of(out, other, **changes)
    runs.only_of(out, config, rl_steps=60)
