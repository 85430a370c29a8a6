"""Meshes that a job may have on a slice, ranked by the analytic model."""

import dataclasses
from collections.abc import Iterator

from dsjax.config import Config, ConfigError, MeshConfig
from dsjax.plan.chips import Topology
from dsjax.plan.roofline import estimate, times
from dsjax.train.layout import check_mesh
from sharding.mesh import factorings

AXES = ("data", "fsdp", "expert", "context", "tensor")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A legal mesh: what a device would hold of its HBM, and how long a step would take, both by arithmetic."""

    mesh: MeshConfig
    hbm: float  # bytes a device
    step_s: float

    @property
    def sizes(self) -> dict[str, int]:
        return vars(self.mesh)


def legal_meshes(config: Config, n_devices: int) -> Iterator[MeshConfig]:
    """Every mesh of n_devices that divides what it is to cut."""
    for split in factorings(n_devices, len(AXES)):
        sizes = dict(zip(AXES, split)) | {"stage": 1}
        try:
            check_mesh(config, sizes)
        except ConfigError:
            continue
        yield MeshConfig(**sizes)


def search(config: Config, topology: Topology, slices: int = 1) -> list[Candidate]:
    """Legal meshes that fit, fastest first; then those that do not, smallest first. Raises ConfigError if none."""
    limit = topology.chip.hbm_bytes / topology.chip.devices
    found = []
    for mesh in legal_meshes(config, topology.devices * slices):
        sizes = vars(mesh)
        if sizes["data"] % slices:
            continue  # slices are joined by replicas alone
        needs = estimate(config, sizes)
        found.append(Candidate(mesh, needs.hbm, times(needs, topology, sizes, slices).predicted))
    if not found:
        raise ConfigError(
            f"--search: no mesh of {topology.devices * slices} devices divides batch_size / accumulate = "
            f"{config.batch_size // config.accumulate} rows; expected a multiple of a divisor of the devices"
        )
    return sorted(found, key=lambda c: (False, c.step_s) if c.hbm <= limit else (True, c.hbm))
