"""The mesh and its table of names: errors show the arithmetic, and a pod's program is checked with no device."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import P

import configs
from dsjax.state import Batch
from dsjax.train.step import init_state, train_step
from sharding.mesh import AXES, MeshError, abstract_mesh, fill_sizes, make_mesh
from sharding.rules import shard_shape, spec


def test_a_mesh_has_all_axes_and_minus_one_takes_what_is_left():
    mesh = make_mesh(fsdp=-1, tensor=2)
    assert mesh.axis_names == AXES
    assert dict(mesh.shape) == {"data": 1, "fsdp": 4, "expert": 1, "context": 1, "tensor": 2, "stage": 1}
    assert all(kind == jax.sharding.AxisType.Explicit for kind in mesh.axis_types)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3, "tensor": 2}, "mesh: data=3 * tensor=2 = 6, but there are 8 devices; set one axis to -1"),
        ({"data": -1, "expert": 3}, "mesh: expert=3 = 3 does not divide the 8 devices; the nearest that does is"),
        ({}, "mesh: 1 = 1, but there are 8 devices"),
    ],
)
def test_a_mesh_that_cannot_be_shows_the_arithmetic(sizes, message):
    with pytest.raises(MeshError) as error:
        fill_sizes(8, **sizes)
    assert str(error.value).startswith(message)


def test_an_axis_that_does_not_exist_is_refused():
    with pytest.raises(MeshError, match=r"^mesh\.pipeline=2: no such axis; choose from data, fsdp, expert"):
        make_mesh(pipeline=2)
    with pytest.raises(MeshError, match="no such axis"):
        abstract_mesh(datum=2)


def test_names_become_axes_and_an_unknown_name_raises():
    assert spec("batch", "seq", None) == P(("data", "fsdp", "expert"), "context", None)
    assert spec("experts", "width", "ff") == P("expert", "fsdp", "tensor")
    with pytest.raises(KeyError, match="widht"):
        spec("batch", "widht")


def test_a_dimension_that_does_not_divide_is_an_error():
    mesh = abstract_mesh(fsdp=4, tensor=2)
    assert shard_shape((8, 6), ("embed", "ff"), mesh) == (2, 3)
    with pytest.raises(ValueError, match="partitioned 4 times"):
        shard_shape((6, 6), ("embed", "ff"), mesh)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("v3", {"data": 2, "fsdp": 64, "expert": 8, "context": 2}),  # 2,048 devices
        ("v2", {"data": 2, "fsdp": 8, "expert": 8, "tensor": 2}),
        ("moe_16b", {"fsdp": 8, "expert": 8, "tensor": 2}),
        ("kimi_k2", {"fsdp": 16, "expert": 8, "tensor": 2}),
    ],
)
def test_a_whole_training_step_types_on_a_pod_with_no_device(name, sizes):
    config = configs.load(name)
    with jax.sharding.use_abstract_mesh(mesh := abstract_mesh(**sizes)):
        shape = (config.accumulate, config.batch_size // config.accumulate, config.seq_len)
        rows = jax.NamedSharding(mesh, spec(None, "batch", "seq"))
        batch = Batch(*[jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)] * 3)
        knobs = {name: jax.ShapeDtypeStruct((), jnp.float32) for name in ("learning_rate", "mtp_weight")}
        knobs |= {"bias_update_speed": knobs["mtp_weight"], "micro_batches": jax.ShapeDtypeStruct((), jnp.int32)}
        before = jax.eval_shape(functools.partial(init_state, config))
        after, metrics = jax.eval_shape(functools.partial(train_step, config=config), before, batch, knobs)
    assert list(map(kind, jax.tree.leaves(before))) == list(map(kind, jax.tree.leaves(after)))
    assert metrics.load.moe.shape == (config.model.num_moe_layers, config.model.n_routed_experts)
    wide = [leaf for leaf in jax.tree.leaves(before.model) if leaf.ndim > 2]
    assert all(any(leaf.sharding.spec) for leaf in wide)  # no matrix is a copy on every device


def kind(leaf) -> tuple:
    return leaf.shape, leaf.dtype, getattr(leaf.sharding, "spec", P())
