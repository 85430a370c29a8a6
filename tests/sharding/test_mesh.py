"""The mesh and its table of names: errors show the arithmetic, and a pod's program is checked with no device."""

import dataclasses
import functools
import math
import re
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import P

import configs
from dsjax.state import Batch
from dsjax.train.step import init_state, train_step
from sharding.mesh import AXES, MeshError, abstract_mesh, arrange, fill_sizes, make_mesh
from sharding.rules import shard_shape, spec


def test_a_mesh_has_all_axes_and_minus_one_takes_what_is_left():
    mesh = make_mesh(fsdp=-1, tensor=2)
    assert mesh.axis_names == AXES
    assert dict(mesh.shape) == {"data": 1, "fsdp": 4, "expert": 1, "context": 1, "tensor": 2, "stage": 1}
    assert all(kind == jax.sharding.AxisType.Explicit for kind in mesh.axis_types)


@pytest.mark.parametrize(
    ("n", "sizes", "message"),
    [
        (8, {"data": 3, "tensor": 2}, "data=3 * tensor=2 = 6, but there are 8 devices; the nearest that fits is "
         "data=4 * tensor=2 = 8; an axis of -1 takes what is left"),
        (8, {"data": 16}, "data=16, but there are 8 devices; the nearest that fits is data=8; "),
        (8, {}, "1, but there are 8 devices; the nearest that fits is fsdp=8; "),
        (8, {"data": -1, "expert": 3}, "expert=3 does not divide the 8 devices; the nearest that does is expert=4"),
        (8, {"fsdp": -1, "expert": 16}, "expert=16 does not divide the 8 devices; the nearest that does is expert=8"),
        (12, {"fsdp": -1, "expert": 4, "tensor": 2}, "expert=4 * tensor=2 = 8 does not divide the 12 devices; the "
         "nearest that does is expert=3 * tensor=2 = 6"),
        (7680, {"data": 7, "fsdp": -1, "expert": 64, "context": 2, "tensor": 4}, "data=7 * expert=64 * context=2 * "
         "tensor=4 = 3584 does not divide the 7680 devices; the nearest that does is data="),
    ],
)  # fmt: skip
def test_a_mesh_that_cannot_be_shows_the_arithmetic_and_the_nearest(n, sizes, message):
    with pytest.raises(MeshError) as error:
        fill_sizes(n, **sizes)
    assert str(error.value).startswith(f"mesh: {message}")


@given(
    n=st.integers(1, 200),
    sizes=st.dictionaries(st.sampled_from(AXES), st.integers(1, 12), max_size=4),
    left=st.booleans(),
)
@settings(deadline=None)
def test_the_mesh_that_an_error_proposes_can_be(n, sizes, left):
    given = {name: size for name, size in sizes.items() if size > 1}
    wanted = {**sizes, "fsdp": -1} if left else sizes
    try:
        filled = fill_sizes(n, **wanted)
    except MeshError as error:
        near = str(error).split(" is ")[1]
        proposed = {name: int(size) for name, size in re.findall(r"(\w+)=(\d+)", near)}
        assert fill_sizes(n, **{**wanted, **proposed}) != fill_sizes(1, fsdp=-1) or n == 1
        assert left or not given or proposed.keys() == given.keys()
    else:
        assert math.prod(filled) == n


@dataclasses.dataclass(frozen=True)
class Chip:
    """As much of a TPU device as the layout of a mesh looks at."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int
    process_index: int = 0
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5"


def pod(n_slices: int, x: int, y: int, z: int) -> list[Chip]:
    """Slices of a v5p pod, in an order that is not that of the slices."""
    places = [(i, j, k) for k in range(z) for j in range(y) for i in range(x)]
    chips = [Chip(s * 1000 + n, place, s) for n, place in enumerate(places) for s in range(n_slices)]
    return chips


def crossings(mesh: np.ndarray) -> list[str]:
    """The axes along which a chip's slice changes."""
    index = np.vectorize(lambda chip: chip.slice_index)(mesh)
    return [name for i, name in enumerate(AXES) if (np.take(index, [0], i) != index).any()]


@pytest.mark.parametrize(
    ("n_slices", "sizes", "across"),
    [
        (1, {"data": 4, "fsdp": 8}, []),
        (2, {"data": 2, "fsdp": 16, "expert": 2}, ["data"]),
        (2, {"data": 4, "expert": 4, "tensor": 4}, ["data"]),
        (4, {"data": 2, "fsdp": 16, "tensor": 4}, ["data", "fsdp"]),
        (3, {"fsdp": 12, "expert": 8}, ["fsdp"]),
        (6, {"data": 4, "fsdp": 12, "expert": 4}, ["data", "fsdp"]),
    ],
)
def test_data_crosses_slices_first_then_fsdp_and_nothing_else(n_slices, sizes, across):
    devices = pod(n_slices, 4, 4, 2)
    filled = fill_sizes(len(devices), **sizes)
    mesh = arrange(devices, filled)
    assert mesh.shape == filled and set(mesh.flat) == set(devices)
    assert crossings(mesh) == across


def test_neighbours_on_a_small_axis_are_neighbours_on_the_torus():
    mesh = arrange(pod(2, 4, 4, 4), fill_sizes(128, data=2, fsdp=16, tensor=4))
    for ring in mesh.reshape(-1, 4):
        steps = [np.abs(np.subtract(a.coords, b.coords)) for a, b in pairwise([*ring, ring[0]])]
        assert all(sorted(step) in ([0, 0, 1], [0, 0, 3]) for step in steps)  # 3: around the torus


def test_sizes_that_split_an_axis_of_the_torus_are_laid_out_too():
    mesh = arrange(pod(1, 4, 4, 4), fill_sizes(64, data=2, fsdp=2, expert=2, context=2, tensor=4))
    assert mesh.shape == (2, 2, 2, 2, 4, 1) and len(set(mesh.flat)) == 64


def test_gpus_keep_the_order_of_their_hosts_and_any_axis_may_cross_them():
    gpus = [Chip(i, (0, 0, 0), i // 8, i // 8, platform="cuda", device_kind="NVIDIA H100") for i in range(32)]
    mesh = arrange(gpus, fill_sizes(32, data=2, expert=16))
    assert [gpu.id for gpu in mesh.flat] == list(range(32)) and crossings(mesh) == ["data", "expert"]


def test_slices_that_no_mesh_fits_are_said_with_the_arithmetic():
    with pytest.raises(MeshError) as error:
        arrange(pod(2, 4, 4, 2), fill_sizes(64, expert=8, tensor=8))
    assert str(error.value) == (
        "mesh: the 2 slices do not divide data=1 * fsdp=1 = 1, and no other axis crosses slices; the nearest that they "
        "divide is data=1 * fsdp=2 = 2"
    )
    with pytest.raises(MeshError, match="the 2 slices have 32, 31 devices, expected equal ones"):
        arrange(pod(2, 4, 4, 2)[:-1], fill_sizes(63, data=63))


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
