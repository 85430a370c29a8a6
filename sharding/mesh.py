"""The mesh: six named axes, always all present, of Explicit type, so that an array's type says where it lives."""

import math

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

AXES = ("data", "fsdp", "expert", "context", "tensor", "stage")


class MeshError(ValueError):
    """A mesh that cannot be built from the devices at hand."""


def make_mesh(devices: list | None = None, **sizes: int) -> Mesh:
    """A mesh over `devices` (all, if not given); axes not named have size 1, and one of size -1 takes what is left.

    Raises MeshError with the arithmetic when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    filled = fill_sizes(len(devices), **sizes)
    return jax.make_mesh(filled, AXES, (AxisType.Explicit,) * len(AXES), devices=devices)


def abstract_mesh(**sizes: int) -> AbstractMesh:
    """The same axes with no device: for checking the types of a pod's program on a laptop."""
    filled = fill_sizes(math.prod(sizes.values()), **sizes)
    return AbstractMesh(filled, AXES, (AxisType.Explicit,) * len(AXES))


def fill_sizes(n_devices: int, **sizes: int) -> tuple[int, ...]:
    """Sizes in the order of AXES with -1 replaced. Raises MeshError."""
    for name in sizes:
        if name not in AXES:
            raise MeshError(f"mesh.{name}={sizes[name]}: no such axis; choose from {', '.join(AXES)}")
    known = math.prod(size for size in sizes.values() if size != -1)
    product = " * ".join(f"{name}={size}" for name, size in sizes.items() if size > 1) or "1"
    if -1 in sizes.values():
        if n_devices % known:
            raise MeshError(
                f"mesh: {product} = {known} does not divide the {n_devices} devices{_nearest(n_devices, known)}"
            )
        sizes = {name: n_devices // known if size == -1 else size for name, size in sizes.items()}
    elif known != n_devices:
        raise MeshError(
            f"mesh: {product} = {known}, but there are {n_devices} devices; set one axis to -1 to take what is left"
        )
    return tuple(sizes.get(axis, 1) for axis in AXES)


def _nearest(n_devices: int, wanted: int) -> str:
    divisors = [d for d in range(1, n_devices + 1) if n_devices % d == 0]
    return f"; the nearest that does is {min(divisors, key=lambda d: abs(d - wanted))}"
