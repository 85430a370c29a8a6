"""The mesh: six named axes, always all present, of Explicit type, so that an array's type says where it lives.

The devices are laid out so that the last axes, which talk most, are nearest neighbours. Where TPUs are in several
slices, joined by a slower network, `data` crosses it, then `fsdp`; no other axis does.
"""

import math
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

AXES = ("data", "fsdp", "expert", "context", "tensor", "stage")


class MeshError(ValueError):
    """A mesh that cannot be built from the devices at hand."""


def make_mesh(devices: list | None = None, **sizes: int) -> Mesh:
    """A mesh over `devices` (all, if not given); axes not named have size 1, and one of size -1 takes what is left.

    Raises MeshError with the arithmetic when the sizes do not multiply to the number of devices, or do not fit slices.
    """
    devices = jax.devices() if devices is None else devices
    filled = fill_sizes(len(devices), **sizes)
    return Mesh(arrange(devices, filled), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def abstract_mesh(**sizes: int) -> AbstractMesh:
    """The same axes with no device: for checking the types of a pod's program on a laptop."""
    filled = fill_sizes(math.prod(sizes.values()), **sizes)
    return AbstractMesh(filled, AXES, (AxisType.Explicit,) * len(AXES))


def fill_sizes(n_devices: int, **sizes: int) -> tuple[int, ...]:
    """Sizes in the order of AXES with -1 replaced. Raises MeshError."""
    for name in sizes:
        if name not in AXES:
            raise MeshError(f"mesh.{name}={sizes[name]}: no such axis; choose from {', '.join(AXES)}")
    given = {name: size for name, size in sizes.items() if size > 1}
    known = math.prod(given.values())
    if -1 in sizes.values():
        if n_devices % known:
            near = _show(nearest_sizes(given, divisors(n_devices)))
            raise MeshError(
                f"mesh: {_show(given)} does not divide the {n_devices} devices; the nearest that does is {near}"
            )
        sizes = {name: n_devices // known if size == -1 else size for name, size in sizes.items()}
    elif known != n_devices:
        near = _show(nearest_sizes(given or {"fsdp": 1}, [n_devices]))
        raise MeshError(
            f"mesh: {_show(given)}, but there are {n_devices} devices; the nearest that fits is {near}; an axis of -1 "
            "takes what is left"
        )
    return tuple(sizes.get(axis, 1) for axis in AXES)


def arrange(devices: list, sizes: tuple[int, ...]) -> np.ndarray:
    """The devices as an array of these sizes, in the order of AXES. Raises MeshError where they do not fit slices."""
    slices: dict[int, list] = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
    # GPUs in order of their hosts need no more: the first axes cross hosts, and any of them may.
    if len(slices) == 1 or devices[0].platform != "tpu":
        return _on_torus(mesh_utils.create_device_mesh, sizes, devices)
    across, within = split_over_slices(sizes, [len(part) for _, part in sorted(slices.items())])
    return _on_torus(mesh_utils.create_hybrid_device_mesh, within, across, devices)


def split_over_slices(sizes: tuple[int, ...], slices: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(sizes across slices, sizes within one) for slices of so many devices each: `data` crosses first, then `fsdp`.

    Raises MeshError where another axis would have to, or where slices differ.
    """
    n = len(slices)
    if len(set(slices)) > 1:
        raise MeshError(f"mesh: the {n} slices have {', '.join(map(str, slices))} devices, expected equal ones")
    data, fsdp = sizes[:2]
    over_data = math.gcd(n, data)
    over_fsdp = n // over_data
    if fsdp % over_fsdp:
        near = nearest_sizes({"data": data, "fsdp": fsdp}, [m for m in divisors(n * slices[0]) if m % n == 0])
        raise MeshError(
            f"mesh: the {n} slices do not divide data={data} * fsdp={fsdp} = {data * fsdp}, and no other axis crosses "
            f"slices; the nearest that they divide is {_show(near)}"
        )
    across = (over_data, over_fsdp, 1, 1, 1, 1)
    return across, tuple(size // over for size, over in zip(sizes, across))


def _on_torus(create, *args) -> np.ndarray:
    try:
        return create(*args)
    except NotImplementedError:  # the sizes are not made of whole axes of the chips' torus
        return create(*args, allow_split_physical_axes=True)


def show_axes(sizes: Mapping[str, int]) -> str:
    """data=2 expert=4: the axes that are used."""
    return " ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)


def divisors(n: int) -> list[int]:
    """All of them, rising."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def nearest_sizes(sizes: dict[str, int], products: list[int]) -> dict[str, int]:
    """The sizes whose product is one of `products` and that differ least from `sizes`, as ratios, in as few axes."""

    def distance(candidate: tuple[int, ...]) -> tuple[float, int]:
        ratios = [abs(math.log(new / old)) for new, old in zip(candidate, sizes.values())]
        return round(sum(ratios), 9), sum(ratio > 0 for ratio in ratios)

    return dict(zip(sizes, min((c for n in products for c in factorings(n, len(sizes))), key=distance)))


def factorings(n: int, k: int) -> Iterator[tuple[int, ...]]:
    """All ways to write n as a product of k numbers in order."""
    if k == 1:
        yield (n,)
        return
    for first in divisors(n):
        yield from ((first, *rest) for rest in factorings(n // first, k - 1))


def _show(sizes: dict[str, int]) -> str:
    """data=2 * expert=4 = 8"""
    product = " * ".join(f"{name}={size}" for name, size in sizes.items()) or "1"
    return f"{product} = {math.prod(sizes.values())}" if len(sizes) > 1 else product
