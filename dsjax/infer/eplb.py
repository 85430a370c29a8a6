"""Which experts get a second place, and where: DeepSeek's expert-parallel load balancer (reference section 3.6).

With more places than experts, the experts of high load are replicated and all replicas packed onto devices, so that no
device has much more to do than the others. Hierarchical where groups of experts divide among nodes (a token's experts
lie in few groups, so in few nodes); global otherwise.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Placement(NamedTuple):
    """Experts by place, and places by expert."""

    expert: np.ndarray  # [L, R] the expert of each place
    place: np.ndarray  # [L, E, most replicas] the places of each expert, -1 where there are no more
    count: np.ndarray  # [L, E] replicas


def place_experts(load: ArrayLike, n_places: int, n_groups: int, n_nodes: int, n_devices: int) -> Placement:
    """Places for experts of these loads [L, E], device after device, node after node.

    Raises ValueError where experts do not divide into groups, places among devices, or devices among nodes, or where
    there are fewer places than experts.
    """
    load = np.asarray(load, np.float64)
    n_experts = load.shape[1]
    for n, of, what in (
        (n_experts, n_groups, "experts among groups"),
        (n_places, n_devices, "places among devices"),
        (n_devices, n_nodes, "devices among nodes"),
    ):
        if n % of:
            raise ValueError(f"{what}: {n} does not divide by {of}")
    if n_places < n_experts:
        raise ValueError(f"{n_places} places for {n_experts} experts; expected as many or more")
    if n_groups % n_nodes:
        n_groups = n_nodes = 1
    expert = np.stack([_of_layer(row, n_places, n_groups, n_nodes, n_devices) for row in load])
    count = np.stack([np.bincount(row, minlength=n_experts) for row in expert])
    place = np.full((*load.shape, count.max()), -1)
    for layer, row in enumerate(expert):
        for e in range(n_experts):
            of_expert = np.flatnonzero(row == e)
            place[layer, e, : len(of_expert)] = of_expert
    return Placement(expert, place, count)


def _of_layer(load: np.ndarray, n_places: int, n_groups: int, n_nodes: int, n_devices: int) -> np.ndarray:
    """The expert of each place."""
    groups = np.arange(len(load)).reshape(n_groups, -1)
    places = []
    for of_node in pack(load[groups].sum(axis=1), n_nodes):
        experts = groups[of_node].ravel()
        replicas = replicate(load[experts], n_places // n_nodes)
        count = np.bincount(replicas, minlength=len(experts))
        devices = pack((load[experts] / count)[replicas], n_devices // n_nodes)
        places.append(experts[replicas[devices.ravel()]])
    return np.concatenate(places)


def even_places(n_layers: int, n_experts: int, n_places: int, n_devices: int) -> Placement:
    """Where all experts have the same load."""
    return place_experts(np.ones((n_layers, n_experts)), n_places, 1, 1, n_devices)


def pack(weight: np.ndarray, n_packs: int) -> np.ndarray:
    """The items of each pack, [n_packs, n / n_packs]: the heaviest first, each into the lightest pack with room."""
    size = len(weight) // n_packs
    if size == 1:
        return np.arange(len(weight))[:, None]
    packs, total = [[] for _ in range(n_packs)], np.zeros(n_packs)
    for item in np.argsort(-weight, kind="stable"):
        chosen = np.argmin([t if len(p) < size else np.inf for t, p in zip(total, packs)])
        packs[chosen].append(item)
        total[chosen] += weight[item]
    return np.array(packs)


def replicate(load: np.ndarray, n_places: int) -> np.ndarray:
    """The expert of each replica: all once, and then again and again the one with most load a replica."""
    replicas, count = list(range(len(load))), np.ones(len(load))
    for _ in range(n_places - len(load)):
        most = int(np.argmax(load / count))
        replicas.append(most)
        count[most] += 1
    return np.array(replicas)
