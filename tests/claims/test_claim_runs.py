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
        assert runs.pretrained(config, run, None, "pre-training", print) == run
    assert [options["explicit"] for options in trained] == [{"steps": 30}]
    for steps, hint in ((20, "choose another --out"), (40, "the same command goes on from there")):
        with pytest.raises(ConfigError, match=f"base: stopped at step 30 of {steps}; {hint}"):
            runs.whole(run, steps)
