"""Checkpoints: whole or not at all, exact, on any mesh, and readable without the optimizer."""

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest

from dsjax.config import ConfigError, replace
from dsjax.state import TrainState
from dsjax.train.checkpoint import Checkpoints, abstract_state, has_checkpoint
from sharding.mesh import make_mesh

# What a failed read or write of a checkpoint leaves behind in its threads.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

CONFIG = models.config(models.v3(num_hidden_layers=2))
ONE = make_mesh(jax.devices()[:1])


def draw_state(config, mesh, seed=0) -> TrainState:
    """A state of random numbers, laid out on the mesh, with nothing compiled."""
    rng = np.random.default_rng(seed)

    def draw(a):
        value = rng.integers(9, size=a.shape) if a.dtype == jnp.int32 else rng.normal(size=a.shape)
        return jax.device_put(value.astype(a.dtype), a.sharding)

    return jax.tree.map(draw, abstract_state(config, mesh))


def assert_equal(a: TrainState, b: TrainState):
    a, b = models.named_leaves(a), models.named_leaves(b)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture(scope="module")
def state():
    return draw_state(CONFIG, ONE)


@pytest.fixture(scope="module")
def saved(state, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    with jax.set_mesh(ONE), Checkpoints(folder, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state, {"steps": [{"loss": 0.1}], "load": [[step]]})
    return folder


def test_a_state_comes_back_bit_for_bit_with_its_notes(saved, state):
    with jax.set_mesh(ONE), Checkpoints(saved) as checkpoints:
        restored, notes = checkpoints.restore(3, abstract_state(CONFIG, ONE))
    assert_equal(restored, state)
    assert notes == {"steps": [{"loss": 0.1}], "load": [[3]]}


@pytest.mark.parametrize("sizes", [{"fsdp": 4, "expert": 2}, {"tensor": 2, "data": 4}])
def test_a_state_moves_to_another_mesh(saved, state, sizes):
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh), Checkpoints(saved) as checkpoints:
        like = abstract_state(CONFIG, mesh)
        restored, _ = checkpoints.restore(3, like)
    assert_equal(restored, state)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(like)):
        assert a.sharding == b.sharding


@pytest.mark.parametrize(
    "changes", [{"num_nextn_predict_layers": 0}, {"topk_method": "greedy", "scoring_func": "softmax"}]
)
def test_models_with_empty_parts(tmp_path, changes):
    model = replace(CONFIG.model, **changes, **({"n_group": 1, "topk_group": 1} if len(changes) > 1 else {}))
    config = replace(CONFIG, model=model, optimizer=replace(CONFIG.optimizer, ema_decay=0.9))
    state = draw_state(config, ONE)
    with jax.set_mesh(ONE), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        restored, _ = checkpoints.restore(1, abstract_state(config, ONE))
    assert_equal(restored, state)
    assert [a.sharding for a in jax.tree.leaves(restored)] == [a.sharding for a in jax.tree.leaves(state)]


def test_inference_reads_the_model_alone(saved, state):
    with jax.set_mesh(ONE), Checkpoints(saved, read_only=True) as checkpoints:
        restored = checkpoints.restore_model(None, abstract_state(CONFIG, ONE))
    assert_equal(restored.model, state.model)
    assert_equal(restored.router_bias, state.router_bias)
    assert all(isinstance(a, jax.ShapeDtypeStruct) for a in jax.tree.leaves(restored.opt_state))


def test_weights_are_read_whatever_else_their_checkpoint_holds(tmp_path):
    averaged = replace(CONFIG, optimizer=replace(CONFIG.optimizer, ema_decay=0.9))
    state, like = draw_state(averaged, ONE), abstract_state(CONFIG, ONE)
    with jax.set_mesh(ONE), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        restored = checkpoints.restore_model(1, like)
        assert_equal(restored.model, state.model)
        assert_equal(restored.router_bias, state.router_bias)
        checkpoints.save(2, state.replace(ema=None), {})
        checkpoints.wait()
        with pytest.raises(ConfigError, match=r"checkpoints/2: this checkpoint is damaged, or of another conf.*ema/"):
            checkpoints.restore_model(2, like.replace(ema=like.model))
        wide = replace(CONFIG, model=replace(CONFIG.model, hidden_size=48))
        with pytest.raises(ConfigError, match=r"checkpoints/1: this checkpoint is damaged, or of another conf"):
            checkpoints.restore_model(1, abstract_state(wide, ONE))


def test_the_newest_are_kept(saved):
    with Checkpoints(saved, read_only=True) as checkpoints:
        assert checkpoints.latest() == checkpoints.find(None) == 3
        assert checkpoints.find(2) == 2
        with pytest.raises(ConfigError, match="expected checkpoint 1, there are: 2, 3"):
            checkpoints.find(1)


def test_a_state_may_be_donated_while_it_is_written(tmp_path, state):
    copy = jax.tree.map(lambda a: jax.device_put(np.asarray(a), a.sharding), state)
    with jax.set_mesh(ONE), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, copy, {})
        for a in jax.tree.leaves(copy):
            a.delete()
        checkpoints.wait()
        restored, _ = checkpoints.restore(1, abstract_state(CONFIG, ONE))
    assert_equal(restored, state)


def test_what_was_not_finished_does_not_count(tmp_path, state):
    unfinished = tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp-1"
    unfinished.mkdir(parents=True)
    assert not has_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="no checkpoint here yet; `dsjax train"):
        Checkpoints(tmp_path, read_only=True)
    with jax.set_mesh(ONE), Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(1, state, {})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_a_checkpoint_of_another_shape_is_refused(saved):
    config = replace(CONFIG, model=replace(CONFIG.model, hidden_size=48))
    with (
        jax.set_mesh(ONE),
        Checkpoints(saved) as checkpoints,
        pytest.raises(ConfigError, match=r"checkpoints/3: this checkpoint is damaged, or of another configuration"),
    ):
        checkpoints.restore(3, abstract_state(config, ONE))


def test_a_write_that_fails_in_the_background_is_told_and_the_next_one_is_tried(tmp_path, state):
    told = []
    with jax.set_mesh(ONE), Checkpoints(tmp_path, tell=lambda step, text: told.append((step, text))) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        (tmp_path / "checkpoints").rename(tmp_path / "gone")
        (tmp_path / "checkpoints").write_text("a file in its place")
        checkpoints.save(2, state, {})
        checkpoints.wait()
        (tmp_path / "checkpoints").unlink()
        (tmp_path / "gone").rename(tmp_path / "checkpoints")
        checkpoints.save(3, state, {})
        checkpoints.wait()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "3"]
    ((step, text),) = told
    assert step == 2 and "checkpoint 2 could not be written" in text and "\n" not in text


def test_a_flipped_bit_anywhere_is_found_or_harmless(saved, state, tmp_path):
    """One bit of every file of the newest checkpoint, and some more of the large ones."""
    draw, like = np.random.default_rng(0), abstract_state(CONFIG, ONE)
    files = [p for p in (saved / "checkpoints" / "3").rglob("*") if p.is_file() and p.stat().st_size]
    arrays = [p for p in files if p.stat().st_size > 20_000]  # most of their bits matter, few of the small files' do
    passed_over = 0
    for path in [*draw.choice(files, 4, replace=False), *draw.choice(arrays, 6)]:
        whole, told = path.read_bytes(), []
        data = bytearray(whole)
        data[draw.integers(len(data))] ^= 1 << draw.integers(8)
        path.write_bytes(data)
        with jax.set_mesh(ONE), Checkpoints(saved, read_only=True, tell=lambda *t, told=told: told.append(t)) as kept:
            step, (restored, _) = kept.newest(lambda step, kept=kept: kept.restore(step, like))
        path.write_bytes(whole)
        assert_equal(restored, state)
        assert step == (2 if told else 3)
        passed_over += step == 2
    assert passed_over >= 2


def test_what_the_disk_does_not_give_back_is_passed_over_at_once(tmp_path, state, monkeypatch):
    """As a disk that loses what it took: the slices read back are not those that were written."""
    told = []
    with jax.set_mesh(ONE), Checkpoints(tmp_path, tell=lambda step, text: told.append((step, text))) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        wait = checkpoints.manager.wait_until_finished

        def lose():
            wait()
            for path in (tmp_path / "checkpoints" / "2").glob("*/ocdbt.process_0/d/*"):
                path.write_bytes(bytes(path.stat().st_size))

        monkeypatch.setattr(checkpoints.manager, "wait_until_finished", lose)
        checkpoints.save(2, state, {})
        checkpoints.wait()
        assert checkpoints.steps() == [1]
    assert [step for step, _ in told] == [2] and "the disk does not give back what was written" in told[0][1]
