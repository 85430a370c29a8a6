"""Where batches live: one global sequence of them, whatever the mesh and whichever process reads a part."""

import hashlib
import itertools
import math

import jax
import numpy as np
import pytest
import runs
from hypothesis import given, settings
from hypothesis import strategies as st

import configs
from dsjax.config import ConfigError, MeshConfig, replace
from dsjax.data.pipeline import TrainRows, batches, load_corpus
from dsjax.train import layout
from dsjax.train.layout import device_mesh, on_mesh, share_of
from dsjax.train.schedule import Schedule
from sharding.mesh import make_mesh
from sharding.rules import spec

NAMES = ("tokens", "segment_ids", "positions")


@pytest.fixture(scope="module", params=["concat", "best_fit"])
def run(request, tmp_path_factory):
    """A configuration with a mixture, FIM, a batch ramp and accumulation, and its corpus."""
    folder = tmp_path_factory.mktemp("run")
    texts, more = runs.write_texts(folder / "texts"), runs.write_texts(folder / "more", seed=1)
    data = replace(runs.micro(texts).data, sources=(str(texts), f"{more}:2.5"), packing=request.param, fim_rate=0.5)
    config = runs.micro(
        texts, data=data, steps=1000, batch_size=24, accumulate=2, batch_size_start=12, batch_ramp_tokens=20_000
    )
    return config, load_corpus(data, 262, folder, progress=False)


def read(run, mesh, owners: list[list], first: int, last: int):
    """The global batches [A, B, T] of steps, put together from the devices' parts that each process reads."""
    config, corpus = run
    schedule, n = Schedule(config), config.batch_size // config.accumulate
    shares = [share_of(devices, mesh, n) for devices in owners]
    rows = [TrainRows(corpus, config.data, config.seq_len, config.seed) for _ in owners]
    readers = [batches(r, schedule.rows, first, last, micro_batch=n, mine=share.rows) for r, share in zip(rows, shares)]
    places = jax.NamedSharding(mesh, spec("batch", "seq")).devices_indices_map((n, config.seq_len))
    for step, parts in zip(range(first, last), zip(*readers, strict=True), strict=True):
        whole = {name: np.full((schedule.at(step).micro_batches, n, config.seq_len), -1) for name in NAMES}
        for (number, arrays), share, devices in zip(parts, shares, owners):
            assert number == step
            for name in NAMES:
                mine = arrays[name].reshape(-1, len(share.rows), config.seq_len)
                for device in devices:
                    index = (slice(None), *places[device])
                    whole[name][index] = share.part(mine, index)
        yield whole


def digest(*args) -> str:
    sha = hashlib.sha256()
    for whole in read(*args):
        for name in NAMES:
            assert whole[name].min() >= 0
            sha.update(whole[name].tobytes())
    return sha.hexdigest()


def shared_out(n: int, **sizes: int):
    """A mesh, and its devices in equal parts for n processes."""
    mesh = make_mesh(jax.devices()[: math.prod(sizes.values())], **sizes)
    devices = mesh.devices.flatten().tolist()
    return mesh, [devices[i * len(devices) // n : (i + 1) * len(devices) // n] for i in range(n)]


@pytest.fixture(scope="module")
def alone(run):
    """Digests of the first 400 and of the last 600 of 1,000 batches, read by one process on one device."""
    mesh, owners = shared_out(1, data=1)
    return digest(run, mesh, owners, 0, 400), digest(run, mesh, owners, 400, 1000)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, {"data": 2, "fsdp": 2, "context": 2}), (3, {"fsdp": 3, "tensor": 2})),
        ((3, {"data": 3, "context": 2}), (4, {"expert": 2, "context": 4})),
        ((4, {"fsdp": 4, "tensor": 2}), (2, {"context": 8})),
    ],
    ids=["2 then 3", "3 then 4", "4 then 2"],
)
def test_a_thousand_batches_are_the_same_for_any_number_of_processes(run, alone, before, after):
    for (n, sizes), (first, last), wanted in zip((before, after), ((0, 400), (400, 1000)), alone):
        assert digest(run, *shared_out(n, **sizes), first, last) == wanted


@given(data=st.data())
@settings(deadline=None, max_examples=25)
def test_row_b_of_micro_batch_a_is_the_same_row_whoever_owns_the_devices(run, data):
    config, corpus = run
    sizes, left = {}, 8
    for axis in data.draw(st.permutations(["data", "fsdp", "expert", "context", "tensor"])):
        most = 2 if axis in ("data", "fsdp", "expert") else left  # 12 rows divide by 4
        sizes[axis] = data.draw(st.sampled_from([d for d in (1, 2, 4, 8) if d <= min(most, left)]))
        left //= sizes[axis]
    if sizes["data"] * sizes["fsdp"] * sizes["expert"] == 8:
        sizes["expert"] = 1
    devices = data.draw(st.permutations(jax.devices()[: math.prod(sizes.values())]))
    mesh = make_mesh(devices, **sizes)
    n = data.draw(st.integers(1, min(4, len(devices))))
    cuts = [0, *sorted(data.draw(st.permutations(range(1, len(devices))))[: n - 1]), len(devices)]
    first = data.draw(st.sampled_from([0, 20, 60, 900]))
    rows, start = TrainRows(corpus, config.data, config.seq_len, config.seed), Schedule(config).first_row(first)
    for whole in read(run, mesh, [devices[a:b] for a, b in itertools.pairwise(cuts)], first, first + 2):
        for name in NAMES:
            for a, b in np.ndindex(whole[name].shape[:2]):
                np.testing.assert_array_equal(whole[name][a, b], rows[start + 12 * a + b][name])
        start += 12 * len(whole["tokens"])


def test_a_process_reads_only_the_rows_that_its_devices_hold():
    mesh, (first, second) = shared_out(2, data=4, tensor=2)
    assert share_of(first, mesh, 8).rows == (0, 1, 2, 3) and share_of(second, mesh, 8).rows == (4, 5, 6, 7)
    mesh, (first, second) = shared_out(2, context=2, tensor=4)  # all rows, half of each
    assert share_of(first, mesh, 8).rows == share_of(second, mesh, 8).rows == tuple(range(8))


def test_a_batch_lies_on_the_mesh_as_it_was():
    mesh = make_mesh(data=2, context=2, tensor=2)
    arrays = {name: np.arange(2 * 4 * 6, dtype=np.int32).reshape(2, 4, 6) + i for i, name in enumerate(NAMES)}
    batch = on_mesh(arrays, mesh)
    assert batch.tokens.sharding.shard_shape((2, 4, 6)) == (2, 2, 3)
    for name in NAMES:
        np.testing.assert_array_equal(getattr(batch, name), arrays[name])


@pytest.mark.parametrize(
    ("sizes", "changes", "message"),
    [
        (
            {"data": 2, "fsdp": 4},
            {"batch_size": 12},
            "mesh: data=2 * fsdp=4 = 8 does not divide batch_size / accumulate = 12; of what divides the 8 devices, "
            "the nearest that does is 4",
        ),
        (
            {"context": 8},
            {"seq_len": 20},
            "mesh: context=8 does not divide seq_len = 20; of what divides the 8 devices, the nearest that does is 4",
        ),
        (
            {"expert": 8},
            {},
            "mesh: expert=8 does not divide model.n_routed_experts = 4; of what divides the 8 devices, the nearest "
            "that does is 4",
        ),
        (
            {"fsdp": 4, "stage": 2},
            {},
            "mesh: stage=2 does not divide the number of pipeline stages = 1; of what divides the 8 devices, the "
            "nearest that does is 1",
        ),
        ({"fsdp": 5}, {}, "mesh: fsdp=5, but there are 8 devices; the nearest that fits is fsdp=8; an axis of -1 "),
    ],
)
def test_a_mesh_that_the_model_or_batch_does_not_divide_by_shows_the_nearest(sizes, changes, message, tmp_path):
    model = replace(runs.micro(tmp_path).model, n_routed_experts=4, n_group=1, topk_group=1)
    config = replace(runs.micro(tmp_path, model=model), mesh=MeshConfig(**{"fsdp": 1, **sizes}), **changes)
    with pytest.raises(ConfigError) as error:
        device_mesh(config)
    assert str(error.value).startswith(message)


def test_a_mesh_of_sizes_that_divide_is_made(tmp_path):
    assert device_mesh(replace(runs.micro(tmp_path), mesh=MeshConfig(expert=2, context=2))).size == len(
        layout.devices()
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("grouped_matmul", "pallas_tpu"),
        ("attention", "splash"),
        ("attention", "cudnn"),
        ("latent_attention", "pallas_tpu"),
        ("latent_attention", "pallas_gpu"),
        ("exchange", "ragged"),
        ("exchange", "pallas_tpu"),
    ],
)
def test_what_a_cpu_cannot_run_is_refused(name, value):
    config = configs.load("tiny")
    config = replace(config, compute=replace(config.compute, **{name: value}))
    with pytest.raises(ConfigError, match=rf"compute\.{name}={value}: runs on [gt]pu.*, here is cpu; auto chooses"):
        layout.device_mesh(config)
