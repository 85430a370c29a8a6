"""What counts as a spike: a loss or gradient norm far above its running median."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dsjax.config import FaultsConfig
from dsjax.train.spikes import MIN_SEEN, is_spike, medians, new_history, remember

FAULTS = FaultsConfig(spike_window=16, spike_norm=10, spike_loss=1.5)


def seen(losses, norms):
    history = new_history(FAULTS)
    for loss, norm in zip(losses, norms):
        history = remember(history, jnp.float32(loss), jnp.float32(norm))
    return history


def spiked(history, loss, norm) -> bool:
    return bool(is_spike(history, jnp.float32(loss), jnp.float32(norm), FAULTS))


def test_nothing_is_a_spike_before_there_is_a_median():
    assert not spiked(new_history(FAULTS), 1e9, 1e9)
    assert not spiked(seen([2.0] * (MIN_SEEN - 1), [1.0] * (MIN_SEEN - 1)), 1e9, 1e9)
    assert spiked(seen([2.0] * MIN_SEEN, [1.0] * MIN_SEEN), 1e9, 1.0)


def test_loss_and_norm_each_have_their_limit():
    history = seen([2.0] * 10, [1.0] * 10)
    assert not spiked(history, 2.99, 9.99)
    assert spiked(history, 3.01, 0.1) and spiked(history, 0.1, 10.01)


def test_nan_and_inf_are_not_spikes():
    history = seen([2.0] * 10, [1.0] * 10)
    assert not any(spiked(history, loss, norm) for loss, norm in [(np.nan, 99), (np.inf, 1), (9, np.inf), (9, np.nan)])


@settings(deadline=None, max_examples=20)
@given(hnp.arrays(np.float32, st.tuples(st.just(2), st.integers(8, 40)), elements=st.floats(0.125, 64, width=32)))
def test_medians_are_numpys_of_the_last_steps(values):
    history = seen(*values)
    np.testing.assert_allclose(medians(history), np.median(values[:, -16:], axis=1), rtol=1e-6)


def test_a_lasting_change_of_level_ends_the_alarm():
    history = seen([2.0] * 16, [1.0] * 16)
    taken = 0
    while spiked(history, 4.0, 1.0):
        history, taken = remember(history, jnp.float32(4.0), jnp.float32(1.0)), taken + 1
    assert 0 < taken <= 9
