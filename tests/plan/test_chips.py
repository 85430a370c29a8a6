"""Topologies and the published numbers of their chips."""

import pytest

from dsjax.config import ConfigError
from dsjax.plan import chips


@pytest.mark.parametrize(
    ("text", "n_chips", "n_devices", "hosts", "cloud"),
    [
        ("v5e:2x4", 8, 8, 2, "v5litepod-8"),
        ("v5e:16x16", 256, 256, 64, "v5litepod-256"),
        ("v5p:2x2x1", 4, 4, 1, "v5p-8"),
        ("v5p:8x8x8", 512, 512, 128, "v5p-1024"),
        ("v5p:8x8x16", 1024, 1024, 256, "v5p-2048"),
        ("v6e:16x16", 256, 256, 64, "v6e-256"),
        ("tpu7x:4x8x8", 256, 512, 64, ""),
    ],
)
def test_a_topology_is_counted_as_cloud_and_jax_count_it(text, n_chips, n_devices, hosts, cloud):
    topology = chips.parse(text)
    counted = topology.chips, topology.devices, topology.hosts, topology.cloud_name, topology.name
    assert counted == (n_chips, n_devices, hosts, cloud, text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("v9:2x2", "no such chip; the nearest is v5"),
        ("v5p", "expected chips along each axis, as in v5p:4x4x4"),
        ("v5p:8x8", "connected in 3D"),
        ("v5e:2x2x2", "connected in 2D"),
        ("v5p:3x5x7", "a host has 2x2x1 chips"),
        ("v6e:32x32", "at most 256"),
        ("v5p:0x2x2", "expected chips along each axis"),
        ("", "no such chip"),
    ],
)
def test_a_bad_topology_is_one_line_that_says_what_would_work(text, says):
    with pytest.raises(ConfigError, match=says) as error:
        chips.parse(text)
    assert "\n" not in str(error.value)


def test_a_link_is_what_is_published_divided_by_its_links_and_directions():
    assert chips.CHIPS["v5p"].ici_link == pytest.approx(100e9)
    assert chips.CHIPS["v5e"].ici_link == pytest.approx(50e9)


def test_the_clocks_are_near_those_of_the_chips():
    assert [round(chip.clock_hz / 1e9, 2) for chip in chips.CHIPS.values()] == [1.5, 1.75, 1.75, 2.2]


def test_an_axis_that_fills_the_torus_uses_all_its_links():
    sizes = {"data": 1, "fsdp": 512, "expert": 1}
    assert chips.axis_bandwidth(chips.parse("v5p:8x8x8"), sizes) == {"fsdp": 600e9}


def test_an_axis_that_fills_one_ring_uses_its_two_directions_and_the_other_the_rest():
    sizes = {"data": 1, "fsdp": 64, "expert": 8}
    assert chips.axis_bandwidth(chips.parse("v5p:8x8x8"), sizes) == {"fsdp": 400e9, "expert": 200e9}


def test_a_line_that_does_not_close_has_one_direction_less():
    assert chips.axis_bandwidth(chips.parse("v5p:2x2x2"), {"fsdp": 8}) == {"fsdp": 300e9}


def test_the_two_devices_of_a_tpu7x_chip_share_its_links():
    assert chips.axis_bandwidth(chips.parse("tpu7x:4x4x4"), {"fsdp": 128}) == {"fsdp": 300e9}
