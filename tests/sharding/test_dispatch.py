"""Tokens go to their experts' devices and come back: against NumPy, flat and in two levels, with room and without."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import P, lax

from pallas_kernels.quantise import Tile, dequantise, quantise
from sharding.dispatch import Buffers, combine, dispatch
from sharding.mesh import make_mesh
from sharding.ragged import Side, choose, exchange

DEVICES, N, K, D, E = 8, 6, 3, 5, 16
RNG = np.random.default_rng(0)
X = RNG.normal(size=(DEVICES * N, D)).astype(np.float32)
WEIGHTS = RNG.random((DEVICES * N, K)).astype(np.float32)
SCALE = 1 + RNG.random(E).astype(np.float32)  # what an expert does: sin(row) * weight * its scale
ROOM = {
    "flat": Buffers(),
    "flat, little room": Buffers(1.2),
    "groups of 4": Buffers(groups=2),
    "groups of 2, little room": Buffers(0.6, groups=4),
    "groups of 1": Buffers(groups=8),
    "aligned": Buffers(alignment=4),
    "groups of 2, little room, aligned": Buffers(0.6, groups=4, alignment=16),
}


def local_layer(x, indices, weights, scale, *, buffers):
    rows, row_weights, plan = dispatch(x, indices, weights, scale.size, buffers)
    expert = jnp.repeat(jnp.arange(scale.size), plan.group_sizes, total_repeat_length=len(rows))
    here = jnp.arange(len(rows)) < jnp.sum(plan.group_sizes)
    y = jnp.sin(rows) * (row_weights * jnp.where(here, scale[expert], 0))[:, None]
    return combine(y, plan), lax.psum(plan.overflow, "expert")


@functools.cache
def layer(buffers):
    """(x, indices, weights, scale, dy) -> (y, rows left out, gradients by x, weights and scale), compiled once."""

    def forward_and_back(x, indices, weights, scale, dy):
        part = P("expert")
        run = jax.shard_map(
            functools.partial(local_layer, buffers=buffers),
            in_specs=(part, part, part, part),
            out_specs=(part, P()),
            check_vma=False,
        )
        y, pull, lost = jax.vjp(lambda x, w, s: run(x, indices, w, s), x, weights, scale, has_aux=True)
        return y, lost, pull(dy)

    return jax.jit(forward_and_back)


def run(buffers, indices, x=X, devices=DEVICES):
    n = devices * N
    with jax.set_mesh(make_mesh(jax.devices()[:devices], expert=devices)):
        arguments = (x[:n], indices[:n].astype(np.int32), WEIGHTS[:n], SCALE, np.cos(X[:n]))
        return jax.tree.map(np.asarray, layer(buffers)(*(jax.device_put(a, P("expert")) for a in arguments)))


def by_numpy(indices):
    y = np.einsum("nd,nk->nd", np.sin(X), WEIGHTS * SCALE[indices])
    dx = np.einsum("nd,nk->nd", np.cos(X) ** 2, WEIGHTS * SCALE[indices])
    inner = np.sum(np.sin(X) * np.cos(X), axis=1)[:, None]
    dscale = np.zeros(E)
    np.add.at(dscale, indices, inner * WEIGHTS)
    return y, (dx, inner * SCALE[indices], dscale)


def random_choices(seed):
    return np.random.default_rng(seed).permuted(np.tile(np.arange(E), (DEVICES * N, 1)), axis=1)[:, :K]


def skewed(first):
    """All tokens to the same experts."""
    return (np.tile(np.arange(K), (DEVICES * N, 1)) + first) % E


choices = st.one_of(st.integers(0, 2**32 - 1).map(random_choices), st.integers(0, E - 1).map(skewed))


@pytest.mark.parametrize("name", ROOM)
@settings(max_examples=15, deadline=None)
@given(indices=choices)
@example(indices=skewed(0))
@example(indices=random_choices(1))
def test_each_token_gets_the_sum_of_its_experts_or_the_missing_rows_are_counted(name, indices):
    y, lost, gradients = run(ROOM[name], indices)
    wanted, wanted_gradients = by_numpy(indices)
    if ROOM[name].factor is None:
        assert lost == 0
    if lost == 0:
        np.testing.assert_allclose(y, wanted, atol=1e-5)
        for got, want in zip(gradients, wanted_gradients, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-4)
    else:
        assert np.max(np.abs(y - wanted)) > 1e-3


def test_experts_rows_begin_at_multiples_and_zeros_fill_the_gaps():
    def local(x, indices, weights):
        rows, row_weights, plan = dispatch(x, indices, weights, E // DEVICES, Buffers(alignment=8))
        return rows, row_weights, plan.group_sizes

    indices = random_choices(2)
    with jax.set_mesh(make_mesh(expert=DEVICES)):
        arguments = (jax.device_put(a, P("expert")) for a in (X, indices.astype(np.int32), WEIGHTS))
        run = jax.shard_map(local, in_specs=(P("expert"),) * 3, out_specs=P("expert"), check_vma=False)
        rows, weights, sizes = map(np.asarray, jax.jit(run)(*arguments))
    rows, weights = rows.reshape(DEVICES, -1, D), weights.reshape(DEVICES, -1)
    assert rows.shape[1] % 8 == 0
    for device, (here, weight, size) in enumerate(zip(rows, weights, sizes.reshape(DEVICES, -1))):
        assert (size % 8 == 0).all()
        for local_expert, stop in enumerate(np.cumsum(size)):
            token, choice = np.nonzero(indices == device * (E // DEVICES) + local_expert)
            own, n = slice(stop - size[local_expert], stop), len(token)
            np.testing.assert_array_equal(np.sort(here[own][:n], axis=0), np.sort(X[token], axis=0))
            assert sorted(weight[own][:n]) == sorted(WEIGHTS[token, choice])
            assert not here[own][n:].any() and not weight[own][n:].any()
        assert not here[np.sum(size) :].any()


@pytest.mark.parametrize("groups", [1, 2], ids=["flat", "two levels"])
def test_in_fp8_rows_go_and_gradients_of_results_come_rounded_once(groups):
    def rounded(a):
        return np.asarray(dequantise(quantise(jnp.asarray(a), Tile(1, 128, ue8m0=True))), np.float64)

    indices = random_choices(3)
    y, lost, (dx, dweights, _) = run(Buffers(groups=groups, fp8=True), indices)
    x, dy, factors = rounded(X), rounded(np.cos(X)), WEIGHTS * SCALE[indices]
    assert lost == 0
    np.testing.assert_allclose(y, np.einsum("nd,nk->nd", np.sin(x), factors), atol=1e-5)
    np.testing.assert_allclose(dx, np.einsum("nd,nk->nd", np.cos(x) * dy, factors), atol=1e-4)
    np.testing.assert_allclose(dweights, np.sum(np.sin(x) * dy, axis=1)[:, None] * SCALE[indices], atol=1e-4)
    assert np.abs(x - X).max() > 1e-2  # it was rounded


def test_little_room_is_enough_for_even_loads_and_too_little_for_skewed_ones():
    even = np.arange(DEVICES * N * K).reshape(-1, K) % E
    assert run(ROOM["flat, little room"], even)[1] == 0
    assert run(ROOM["flat, little room"], skewed(0))[1] > 0


@pytest.mark.parametrize(
    ("buffers", "dtype", "indices"),
    [
        (Buffers(1.2), jnp.bfloat16, skewed(7)),
        (Buffers(0.6, groups=2, alignment=4, fp8=True), np.float32, random_choices(5)),
    ],
    ids=["flat, bfloat16, skewed", "two levels, fp8"],
)
def test_the_kernel_for_tpus_gives_what_the_gather_gives_bit_for_bit(buffers, dtype, indices):
    names, x = ("pallas_interpret", "gather"), X.astype(dtype)
    got, wanted = (run(buffers._replace(exchange=name), indices, x, devices=4) for name in names)
    assert wanted[1] > 0  # there was too little room
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_what_is_left_out_is_counted_exactly():
    # Flat, all tokens choose experts 0, 1, 2 of devices 0 and 1: a row to each, of which some find room.
    buffers = ROOM["flat, little room"]
    even = N * DEVICES * (1 - (1 - 1 / DEVICES) ** K)
    room, pairs_room = buffers.rows(even, DEVICES * N), buffers.rows(N * K, 10**6)
    rows_lost = 2 * (DEVICES * N - room)
    pairs_lost = max(2 * room - pairs_room, 0) + max(room - pairs_room, 0)
    assert run(buffers, skewed(0))[1] == rows_lost + pairs_lost


@pytest.mark.parametrize("peers", [None, ((0, 2, 4, 6), (1, 3, 5, 7))], ids=["all", "every second"])
def test_exchange_moves_each_row_to_its_place(peers):
    groups = peers or (tuple(range(DEVICES)),)
    p, rng = len(groups[0]), np.random.default_rng(3)
    sizes = rng.integers(0, 4, size=(DEVICES, p)).astype(np.int32)  # [device, its peers]
    x = rng.normal(size=(DEVICES, 4 * p, 2)).astype(np.float32)
    starts = np.cumsum(sizes, axis=1, dtype=np.int32) - sizes
    wanted = np.zeros((DEVICES, 4 * p, 2), np.float32)
    lands, received, there = (np.zeros((DEVICES, p), np.int32) for _ in range(3))
    for group in groups:
        for j, receiver in enumerate(group):
            at = 0
            for i, sender in enumerate(group):
                n, start = sizes[sender, j], starts[sender, j]
                wanted[receiver, at : at + n] = x[sender, start : start + n]
                lands[sender, j], received[receiver, i], there[receiver, i] = at, n, start
                at += n
    begins = np.cumsum(received, axis=1, dtype=np.int32) - received

    def local(x, *sides):
        x, *sides = (a[0] for a in (x, *sides))
        return exchange((x,), 4 * p, Side(*sides[:3]), Side(*sides[3:]), "expert", peers)[0][None]

    with jax.set_mesh(make_mesh(expert=DEVICES)):
        part = P("expert")
        f = jax.jit(jax.shard_map(local, in_specs=(part,) * 7, out_specs=part, check_vma=False))
        got = f(*(jax.device_put(a, part) for a in (x, starts, sizes, lands, begins, received, there)))
    np.testing.assert_array_equal(got, wanted)


def test_an_unknown_exchange_is_refused():
    with pytest.raises(ValueError, match=r"implementation='ragged_all': choose one of \['auto', 'gather', 'ragged', "):
        choose("ragged_all")
