"""The TPU kernel of the exchange, interpreted: every row in its place, no race, and nobody is written to early."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P, lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.exchange_tpu import pallas_tpu, row_alignment
from sharding.mesh import make_mesh

DATA, PEERS, ALIGNMENT, ROWS = 2, 4, 32, 160
SIZES = np.array([[0, 40, 3, 32], [64, 0, 31, 1], [0, 0, 0, 0], [5, 33, 0, 64]], np.int32)  # [sender, receiver]
DEVICES = np.arange(PEERS, dtype=np.int32)
EAGER = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", dma_execution_mode="eager")


def before(sizes, axis):
    whole = -(-sizes // ALIGNMENT) * ALIGNMENT
    return np.cumsum(whole, axis=axis, dtype=np.int32) - whole


STARTS, LANDS = before(SIZES, axis=1), before(SIZES, axis=0)


def late(x):
    """x, on the first device after a while."""

    def wait(x, first):
        time.sleep(0.5 * bool(first))
        return x

    first = lax.axis_index("expert") + lax.axis_index("data") == 0
    return jax.pure_callback(wait, jax.typeof(x), x, first)


def there_and_back(x, small):
    """What arrives of two arrays, and what returns of it, on 2 x 4 devices of which those along `expert` exchange."""

    def local(x, small):
        me = lax.axis_index("expert")
        starts, sizes, lands = (jnp.asarray(a) for a in (STARTS, SIZES, LANDS))
        out, back = (starts[me], sizes[me], lands[me]), (lands[:, me], sizes[:, me], starts[:, me])
        options = {"alignment": ALIGNMENT, "collective_id": 0, "interpret": EAGER}
        arrays = late(x), small
        arrived = pallas_tpu(arrays, ROWS, out, back[1], jnp.asarray(DEVICES), "expert", **options)
        returned = pallas_tpu(arrived, ROWS, back, out[1], jnp.asarray(DEVICES), "expert", **options)
        return arrived, returned

    part = P(("data", "expert"))
    with jax.set_mesh(make_mesh(data=DATA, expert=PEERS)):
        run = jax.jit(jax.shard_map(local, in_specs=(part, part), out_specs=part, check_vma=False))
        arrived, returned = run(*(jax.device_put(a, part) for a in (x, small)))
    return [np.asarray(a).reshape(DATA, PEERS, ROWS, -1) for a in (*arrived, *returned)]


def test_rows_arrive_and_return_without_a_race_and_a_late_peer_is_waited_for(capfd):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (DATA * PEERS * ROWS, 7)).astype(np.uint8)
    small = rng.standard_normal((DATA * PEERS * ROWS, 2)).astype(np.float32)
    arrived_x, arrived_small, returned_x, returned_small = there_and_back(x, small)
    for sent, arrived, returned in ((x, arrived_x, returned_x), (small, arrived_small, returned_small)):
        sent = sent.reshape(arrived.shape)
        for sender, receiver in np.ndindex(SIZES.shape):
            size, start, land = (a[sender, receiver] for a in (SIZES, STARTS, LANDS))
            rows = sent[:, sender, start : start + size]
            np.testing.assert_array_equal(arrived[:, receiver, land : land + size], rows)
            np.testing.assert_array_equal(returned[:, sender, start : start + size], rows)
    assert "RACE DETECTED" not in capfd.readouterr().out  # the detector of JAX 0.10 only prints


@pytest.mark.parametrize(
    ("alignment", "rows", "message"),
    [
        (8, 16, "alignment=8: rows of bfloat16 need a multiple of 16"),
        (16, 24, "rows=16 to rows=24: expected multiples"),
    ],
)
def test_rows_that_cannot_be_copied_are_refused(alignment, rows, message):
    x, none = jnp.zeros((16, 4), jnp.bfloat16), jnp.zeros(1, jnp.int32)
    with pytest.raises(ValueError, match=message):
        pallas_tpu((x,), rows, (none,) * 3, none, none, "expert", alignment=alignment, collective_id=0)


def test_rows_of_every_format_fill_tiles():
    assert [row_alignment(dtype) for dtype in (np.float32, jnp.bfloat16, np.uint8)] == [8, 16, 32]
