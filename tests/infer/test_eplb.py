"""Expert placement: the published vector, and what holds for any loads."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.infer.eplb import pack, place_experts, replicate

LOAD = [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
PUBLISHED = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def test_the_published_vector():
    got = place_experts(LOAD, n_places=16, n_groups=4, n_nodes=2, n_devices=8)
    np.testing.assert_array_equal(got.expert, PUBLISHED)


shapes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 3), st.sampled_from([1, 2]))


@given(shapes, st.data())
@settings(deadline=None)
def test_every_expert_has_a_place_and_no_device_more_places_than_another(shape, data):
    n_nodes, devices_a_node, groups_a_node, extra, experts_a_group = shape
    n_devices, n_groups = n_nodes * devices_a_node, n_nodes * groups_a_node
    n_experts = n_groups * experts_a_group
    n_places = n_devices * (-(-n_experts // n_devices) + extra)
    n_places += n_places % n_nodes
    if n_places % n_devices or n_places // n_nodes < n_experts // n_nodes:
        return
    load = data.draw(st.lists(st.integers(0, 1000), min_size=n_experts, max_size=n_experts))
    got = place_experts(np.array([load]), n_places, n_groups, n_nodes, n_devices)
    assert got.expert.shape == (1, n_places) and set(got.expert[0].tolist()) == set(range(n_experts))
    for expert in range(n_experts):
        places = [p for p in got.place[0, expert].tolist() if p >= 0]
        assert len(places) == got.count[0, expert] and all(got.expert[0, p] == expert for p in places)
        if n_nodes > 1:  # a group stays on its node
            group = expert // experts_a_group
            others = [e for e in range(n_experts) if e // experts_a_group == group]
            nodes = {p // (n_places // n_nodes) for e in others for p in got.place[0, e] if p >= 0}
            assert len(nodes) == 1


def test_replicas_lower_the_highest_load_of_a_device():
    rng, before, after = np.random.default_rng(0), [], []
    for load in rng.pareto(1.0, (200, 1, 16)):  # a few experts have most of the tokens
        got = place_experts(load, 20, 1, 1, 4)
        share = load[0] / got.count[0]
        before.append(load.reshape(4, 4).sum(axis=1).max() / load.sum() * 4)
        after.append(share[got.expert[0]].reshape(4, 5).sum(axis=1).max() / load.sum() * 4)
    assert np.mean(before) > 2 and np.mean(after) < 1.2


def test_packs_and_replicas_by_hand():
    assert pack(np.array([3.0, 9, 1, 5]), 2).tolist() == [[1, 2], [3, 0]]
    assert replicate(np.array([8.0, 2, 5]), 6).tolist() == [0, 1, 2, 0, 2, 0]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((16, 5, 1, 8), "experts among groups: 12 does not divide by 5"),
        ((15, 4, 2, 8), "places among devices: 15 does not divide by 8"),
        ((16, 4, 3, 8), "devices among nodes: 8 does not divide by 3"),
        ((8, 4, 2, 8), "8 places for 12 experts; expected as many or more"),
    ],
)
def test_what_does_not_divide_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        place_experts(LOAD, *sizes)
