"""A run that goes on from another one: it begins with the whole state, and refuses what it cannot go on from."""

import fcntl
import json
from pathlib import Path

import jax
import models
import numpy as np
import pytest
import runs

from dsjax.config import ConfigError, RopeScaling, load, replace, save
from dsjax.data.tokenizer import bytes_tokenizer
from dsjax.state import TrainState
from dsjax.train import layout, loop, phase
from dsjax.train.checkpoint import Checkpoints, abstract_state
from dsjax.train.phase import Origin, begin, first_state, origin
from sharding.mesh import make_mesh

ONE = make_mesh(jax.devices()[:1])
YARN = RopeScaling(factor=4, original_max_position_embeddings=96)


def draw(config) -> TrainState:
    """A state of random numbers with nothing compiled."""
    rng = np.random.default_rng(0)

    def leaf(a):
        value = rng.integers(1, 9, size=a.shape) if a.dtype == np.int32 else rng.normal(size=a.shape)
        return jax.device_put(value.astype(a.dtype), a.sharding)

    return jax.tree.map(leaf, abstract_state(config, ONE))


def longer(config, **changes):
    """The phase after it: four times the positions."""
    model = replace(config.model, max_position_embeddings=384, rope_scaling=YARN)
    return replace(config, name="micro-384", seq_len=64, model=model, **changes)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run with averaged weights, stopped at step 5: its folder, configuration and state."""
    folder = tmp_path_factory.mktemp("source") / "run"
    folder.mkdir()
    config = runs.micro(folder / "texts", optimizer=replace(runs.micro(folder).optimizer, ema_decay=0.9))
    state = draw(config)
    with jax.set_mesh(ONE), Checkpoints(folder) as checkpoints:
        checkpoints.save(5, state, {"steps": [], "load": []})
    save(config, folder / "config.json")
    bytes_tokenizer().save(folder / "tokenizer.json")
    (folder / "lock").touch()
    return folder, config, state


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_it_begins_with_every_array_of_the_newest_checkpoint_at_step_0(source, tmp_path, ema_decay):
    folder, config, state = source
    config = longer(config, optimizer=replace(config.optimizer, ema_decay=ema_decay))
    begun = begin(config, tmp_path, folder, {})
    assert begun == replace(config, data=replace(config.data, tokenizer="run"))
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert origin(tmp_path) == Origin(str(folder), 5)
    with jax.set_mesh(ONE):
        first = models.named_leaves(first_state(origin(tmp_path), begun, ONE, lambda _: None))
    expected = models.named_leaves(state.replace(ema=None) if ema_decay is None else state)
    assert first.keys() == expected.keys()
    for name, value in first.items():
        if name == "history":  # of losses at another length
            assert np.isnan(value).all()
            continue
        zero = name in ("step", "skipped", "skipped_in_a_row")
        np.testing.assert_array_equal(value, np.zeros_like(value) if zero else expected[name], err_msg=name)
    assert any("mu" in name for name in first)  # Adam's moments are among them


def test_it_may_begin_with_weights_alone(source, tmp_path, monkeypatch):
    folder, config, state = source
    with monkeypatch.context() as patch:
        patch.setattr(phase, "Checkpoints", None)  # `begin` is of one process of several, and these are opened by all
        begun = begin(longer(config), tmp_path, folder, {}, weights_alone=True)
    assert origin(tmp_path) == Origin(str(folder), 5, weights_alone=True)
    assert begin(longer(config), tmp_path, None, {}) == begun  # a kill before the first checkpoint
    assert origin(tmp_path) == Origin(str(folder), 5, weights_alone=True)
    with jax.set_mesh(ONE):
        first = models.named_leaves(first_state(origin(tmp_path), begun, ONE, lambda _: None))
    came = models.named_leaves(state)
    for name, value in first.items():
        kept = name.startswith(("model", "router_bias", "ema"))
        expected = came[name.replace("ema", "model")] if kept else np.zeros_like(value)
        if name != "history":
            np.testing.assert_array_equal(value, expected, err_msg=name)


def test_averages_begin_as_the_weights_where_there_were_none(source, tmp_path):
    config = source[1]
    plain = replace(config, optimizer=replace(config.optimizer, ema_decay=None))
    folder, state = tmp_path / "plain", draw(plain)
    folder.mkdir()
    save(plain, folder / "config.json")
    with jax.set_mesh(ONE), Checkpoints(folder) as checkpoints:
        checkpoints.save(2, state, {"steps": [], "load": []})
    with jax.set_mesh(ONE):
        first = first_state(Origin(str(folder), 2), config, ONE, lambda _: None)
    model, ema = models.named_leaves(state.model), models.named_leaves(first.ema)
    assert all(np.array_equal(model[name], ema[name]) for name in model)


def test_a_run_that_has_begun_keeps_to_where_it_came_from(source, tmp_path):
    folder, config, _ = source
    run = tmp_path / "run"
    run.mkdir()
    begin(longer(config), run, folder, {})
    assert begin(longer(config), run, None, {}).data.tokenizer == "run"  # a kill before the first checkpoint
    (run / "checkpoints" / "0").mkdir(parents=True)
    for came in (folder, None):
        assert begin(longer(config), run, came, {}) == longer(config)
    with pytest.raises(ConfigError, match=rf"^elsewhere: the run in {run} began with {folder}, step 5; choose"):
        begin(longer(config), run, Path("elsewhere"), {})
    (run / "from.json").unlink()
    with pytest.raises(ConfigError, match="began with new weights; choose another --run"):
        begin(longer(config), run, folder, {})


def test_what_it_cannot_go_on_from_is_one_line(source, tmp_path):
    folder, config, _ = source
    other = replace(longer(config), model=replace(longer(config).model, v_head_dim=16))
    for wanted, came, explicit, message in (
        (config, tmp_path / "none", {}, "none: expected a run folder with a checkpoint"),
        (config, tmp_path, {}, "expected another folder than that of --run"),
        (other, folder, {}, r"^model.v_head_dim=16: the run in .* has 12; of its network only rope_scaling and max"),
        (config, folder, {"data.tokenizer": "bpe"}, "^data.tokenizer=bpe: expected run, the tokenizer is that of"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            begin(wanted, tmp_path, came, explicit)
        assert "\n" not in str(error.value)
    with (folder / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match=f"^{folder}: another process is training there; wait"):
            begin(longer(config), tmp_path, folder, {})
    assert not (tmp_path / "from.json").exists()
    begin(longer(config), tmp_path, folder, {})
    (tmp_path / "from.json").write_text(json.dumps({"run": str(folder), "step": 4}))
    with pytest.raises(ConfigError, match="expected checkpoint 4, there are: 5"), jax.set_mesh(ONE):
        first_state(origin(tmp_path), longer(config), ONE, lambda _: None)
    assert load(folder / "config.json") == config  # the source is left as it was


@pytest.mark.slow
def test_a_phase_has_the_same_losses_on_two_devices_of_context(tmp_path, monkeypatch):
    monkeypatch.setattr(loop.Run, "_evaluate", lambda *_: None)
    config, came = runs.micro(runs.write_texts(tmp_path / "texts"), steps=3), tmp_path / "run"
    came.mkdir()
    save(config, came / "config.json")
    bytes_tokenizer().save(came / "tokenizer.json")
    with jax.set_mesh(ONE), Checkpoints(came) as checkpoints:
        checkpoints.save(5, models.state(config), {"steps": [], "load": []})
    losses = {}
    for n in (1, 2):
        monkeypatch.setattr(layout, "devices", lambda n=n: jax.devices()[:n])
        later = longer(config, batch_size=4, log_every=1, mesh=replace(config.mesh, fsdp=1, context=n))
        loop.train(replace(later, seq_len=256), tmp_path / str(n), quiet=True, source=came)
        losses[n] = [row["loss"] for row in runs.rows(tmp_path / str(n)) if row["kind"] == "train"]
    assert len(losses[1]) == 3
    assert losses[2] == pytest.approx(losses[1], rel=1e-5)
