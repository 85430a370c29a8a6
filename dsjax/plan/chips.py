"""TPU generations as Google publishes them, and what a topology string such as v5p:8x8x16 stands for.

Published: the pages named in `Chip.source`, read in November 2026. Nothing here was measured by us.
"""

import dataclasses
import math
import re

from dsjax.config import ConfigError, nearest, show

_DOCS = "https://docs.cloud.google.com/tpu/docs"
GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation. Everything is of one chip; bandwidths in bytes a second."""

    name: str  # as libtpu writes it before the colon
    bf16_flops: float
    fp8_flops: float  # that of bf16 where the matrix units have no fp8
    hbm_bytes: int
    hbm_bandwidth: float
    ici_bandwidth: float  # of all links together, both directions
    dcn_bandwidth: float
    devices: int  # JAX devices: v5p's two TensorCores are one (megacore), tpu7x's are two
    dimensions: int  # of the interconnect
    wrap_at: int  # extent from which an axis closes to a ring
    largest: int  # chips of a slice
    source: str
    clock_hz: float  # of the compiler's cycles; assumed
    cores: int  # TensorCores, in which Cloud counts v5p: v5p-1024 has 512 chips
    cloud: str  # accelerator type for queued resources, before the count; "" where there is none
    runtime: str  # software version of its VMs
    gke_accelerator: str
    gke_machine: str

    @property
    def ici_link(self) -> float:
        """One direction of one link."""
        return self.ici_bandwidth / (4 * self.dimensions)


# Of matrix units of side 128, from v6e 256, as many as bring the compiler's cycles for a large product to 0.9 of the
# published peak; one multiply-add is two operations.
def _clock(flops: float, mxus: int, side: int) -> float:
    return flops / (mxus * side * side * 2)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            "v5e", 197e12, 197e12, 16 * GIB, 819e9, 400e9, 25e9 / 8, 1, 2, 16, 256, f"{_DOCS}/v5e",
            _clock(197e12, 4, 128), 1, "v5litepod", "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", "ct5lp-hightpu-4t",
        ),
        Chip(
            "v5p", 459e12, 459e12, 95 * GIB, 2765e9, 1200e9, 50e9 / 8, 1, 3, 4, 6144, f"{_DOCS}/v5p",
            _clock(459e12, 8, 128), 2, "v5p", "v2-alpha-tpuv5", "tpu-v5p-slice", "ct5p-hightpu-4t",
        ),
        Chip(
            "v6e", 918e12, 918e12, 32 * GIB, 1638e9, 800e9, 100e9 / 8, 1, 2, 16, 256, f"{_DOCS}/v6e",
            _clock(918e12, 4, 256), 1, "v6e", "v2-alpha-tpuv6e", "tpu-v6e-slice", "ct6e-standard-4t",
        ),
        Chip(
            "tpu7x", 2307e12, 4614e12, 192 * GIB, 7380e9, 1200e9, 100e9 / 8, 2, 3, 4, 9216, f"{_DOCS}/tpu7x",
            _clock(2307e12, 8, 256), 2, "", "", "tpu7x", "tpu7x-standard-4t",
        ),
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of one generation: v5p:8x8x16 has 1024 chips. Several slices are joined by the data centre's network."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices

    @property
    def hosts(self) -> int:
        return max(1, self.chips // 4)

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{self.extent}"

    @property
    def extent(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def cloud_name(self) -> str:
        """As Cloud counts it: v5p-1024 (TensorCores), v6e-256 (chips)."""
        return f"{self.chip.cloud}-{self.chips * self.chip.cores}" if self.chip.cloud else ""


def parse(text: str) -> Topology:
    """The topology that a text such as v5p:8x8x16 names. Raises ConfigError, one line."""
    name, colon, extent = text.partition(":")
    if name not in CHIPS:
        raise ConfigError(
            f"--topology={show(text)}: no such chip; the nearest is {nearest(name, CHIPS)[0]} "
            f"(of {', '.join(CHIPS)}), as in v5p:8x8x8"
        )
    chip = CHIPS[name]
    example = "x".join(["4"] * chip.dimensions)
    if not colon or not re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4})*", extent):
        raise ConfigError(f"--topology={show(text)}: expected chips along each axis, as in {name}:{example}")
    shape = tuple(int(n) for n in extent.split("x"))
    if len(shape) != chip.dimensions:
        raise ConfigError(
            f"--topology={text}: {name} is connected in {chip.dimensions}D; expected as in {name}:{example}"
        )
    topology = Topology(chip, shape)
    if topology.chips > chip.largest:
        raise ConfigError(f"--topology={text}: {topology.chips} chips; a slice of {name} has at most {chip.largest}")
    host = (2, 2, 1)[: chip.dimensions]
    if topology.chips > 1 and any(n % h for n, h in zip(shape, host)):
        raise ConfigError(f"--topology={text}: a host has {'x'.join(map(str, host))} chips, which must divide {extent}")
    return topology


def axis_bandwidth(topology: Topology, sizes: dict[str, int]) -> dict[str, float]:
    """Bytes a second that a device can send along each mesh axis inside the slice.

    Assumed, as `mesh_utils` tries to: the mesh's axes are laid on the torus's dimensions in order, an axis gets the
    links of the dimensions that it fills, both ways where the dimension is a ring, and axes that share a dimension
    share its links. Devices of one chip share the chip's links.
    """
    chip, left, at = topology.chip, list(topology.shape), len(topology.shape) - 1
    bandwidth = {}
    for axis, size in reversed(sizes.items()):
        if size == 1:
            continue
        links, rest = 0.0, size
        if axis == _innermost(sizes) and chip.devices > 1 and rest % chip.devices == 0:
            rest //= chip.devices  # the two devices of a chip are neighbours
        while rest > 1 and at >= 0:
            part = math.gcd(rest, left[at])
            if part == 1:
                at -= 1
                continue
            links += 2.0 if topology.shape[at] >= chip.wrap_at else 1.0
            left[at] //= part
            rest //= part
            if left[at] == 1:
                at -= 1
        bandwidth[axis] = max(links, 1.0) * chip.ici_link / chip.devices
    return bandwidth


def _innermost(sizes: dict[str, int]) -> str:
    return [axis for axis, size in sizes.items() if size > 1][-1]
