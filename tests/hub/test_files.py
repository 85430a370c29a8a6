"""Folders of safetensors: what we write others read, what others write we read, and damage is told before any work."""

import json
import struct

import checkpoints
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.hub.files import INDEX, NAMES, HubError, Planned, open_folder, plan_shards, read_header, write_shards

TENSORS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.arange(6, dtype=np.float16),
    "empty": np.zeros((0, 3), np.float32),
    "scalar": np.array(7, np.int64),
}


def plan(tensors):
    return [Planned(name, NAMES[a.dtype], a.shape) for name, a in tensors.items()]


def write(folder, tensors, shard_bytes=1 << 30):
    write_shards(folder, plan_shards(plan(tensors), shard_bytes), (a for a in tensors.values() if a.size))


def test_what_we_write_the_library_reads(tmp_path):
    write(tmp_path, TENSORS)
    got = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert got.keys() == TENSORS.keys()
    for name, a in TENSORS.items():
        np.testing.assert_array_equal(got[name], a)


def test_what_the_library_writes_we_read(tmp_path):
    safetensors.numpy.save_file(TENSORS, tmp_path / "model.safetensors")
    for name, stored in open_folder(tmp_path).items():
        got = stored.read(*(slice(None) for _ in stored.shape))
        np.testing.assert_array_equal(got, TENSORS[name])
        assert got.dtype == TENSORS[name].dtype


def test_shards_and_their_index(tmp_path):
    tensors = {f"t{i}": np.full((4, 5), i, ml_dtypes.bfloat16) for i in range(7)}
    write(tmp_path, tensors, shard_bytes=100)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)
    ]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in tensors.values())
    found = open_folder(tmp_path)
    assert {name: stored.file.name for name, stored in found.items()} == index["weight_map"]
    assert all(np.all(found[name].read(slice(1, 3), slice(None)) == a[1:3]) for name, a in tensors.items())


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.integers(1, 120))
@settings(max_examples=50, deadline=None)
def test_shards_keep_the_order_and_the_size(sizes, most):
    planned = [Planned(f"t{i}", "U8", (n,)) for i, n in enumerate(sizes)]
    shards = plan_shards(planned, most)
    assert [t for shard in shards for t in shard] == planned
    assert all(len(shard) == 1 or sum(t.n_bytes for t in shard) <= most for shard in shards)


def test_a_wrong_piece_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a: a piece of float64"):
        write_shards(tmp_path, [plan({"a": TENSORS["a"]})], iter([np.zeros((3, 4))]))


def raw(file, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry()}, b"\0" * 7, "truncated: a ends at byte"),
        ({"a": entry()}, b"\0" * 9, "1 bytes behind the last tensor"),
        ({"a": entry(offsets=(4, 12))}, b"\0" * 12, "data_offsets of a begin at 4, expected 0"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12, "data_offsets of b begin at 4, expected 8"),
        ({"a": entry(offsets=(0, 4))}, b"\0" * 4, r"data_offsets hold 4 bytes, and F32\[2\] takes 8"),
        ({"a": entry(offsets=(8, 0))}, b"\0" * 8, "data_offsets hold -8 bytes"),
        ({"a": entry(offsets=(-8, 0))}, b"", "expected dtype, shape and data_offsets"),
        ({"a": entry(shape=(-2,))}, b"\0" * 8, "expected dtype, shape and data_offsets"),
        ({"a": entry(shape=(2**62, 2**62), offsets=(0, 8))}, b"\0" * 8, "expected dtype, shape"),
        ({"a": entry(dtype="Q4")}, b"\0" * 8, "a: dtype Q4; expected one of F64"),
        ({"a": [1]}, b"", "expected dtype, shape and data_offsets"),
        ([1], b"", "expected an object, got a list"),
        (b"{", b"", "not JSON"),
        (b"\xff\xfe", b"", "not JSON"),
        (b"[" * 100_000, b"", "not JSON"),
        (b'{"a": {}, "a": {}}', b"", "a is there twice"),
    ],
)
def test_a_damaged_header_is_told(tmp_path, header, data, message):
    raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(HubError, match=message) as error:
        open_folder(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\0" * 7, struct.pack("<Q", 1 << 60), struct.pack("<Q", 100) + b"{}"])
def test_a_cut_header_is_told(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(HubError, match="no safetensors file"):
        read_header(tmp_path / "x.safetensors")


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_no_bytes_are_a_crash(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(content)) + content)
    with pytest.raises(HubError):
        read_header(file)


@pytest.mark.parametrize("path", ["../out.safetensors", "/etc/out.safetensors", "a/../../out.safetensors", "a\\b"])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path, path):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": path}}))
    with pytest.raises(HubError, match="leaves the folder"):
        open_folder(tmp_path)


def test_an_index_that_does_not_fit_its_files_is_told(tmp_path):
    write(tmp_path, {f"t{i}": np.zeros(50, np.uint8) for i in range(4)}, shard_bytes=100)
    index = json.loads((tmp_path / INDEX).read_text())
    first, second = sorted(set(index["weight_map"].values()))

    def with_map(**changes):
        values = index["weight_map"] | changes
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": {k: v for k, v in values.items() if v}}))

    for changes, message in (
        ({"t0": second}, f"holds t0, which {INDEX} says is in {second}"),
        ({"t3": None}, f"holds t3, which {INDEX} says is nowhere"),
        ({"t4": first}, "t4 is not in it"),
        ({"t4": "model-9.safetensors"}, f"missing, and {INDEX} names it"),
        ({"t4": "model-9.bin"}, "expected .safetensors files alone"),
        ({"t4": 3}, "expected a weight_map"),
    ):
        with_map(**changes)
        with pytest.raises(HubError, match=message):
            open_folder(tmp_path)
    (tmp_path / INDEX).write_text("[]")
    with pytest.raises(HubError, match="expected an object"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["pytorch_model.bin"], "is a pickle, which can run any code"),
        (["model.pt", "config.json"], "is a pickle"),
        (["config.json"], "no weights; expected model.safetensors"),
        (["model-00001-of-00002.safetensors"], f"{INDEX} is missing"),
    ],
)
def test_a_folder_without_safetensors_is_refused_with_the_reason(tmp_path, files, message):
    for name in files:
        (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(HubError, match=message):
        open_folder(tmp_path)


def test_a_missing_folder_is_told(tmp_path):
    with pytest.raises(HubError, match="no such folder"):
        open_folder(tmp_path / "nowhere")


def test_a_checkpoint_folder_of_ours_opens(tmp_path):
    cfg = checkpoints.KINDS["moonlight"]
    checkpoints.write(tmp_path, checkpoints.draw(cfg), cfg, shard_bytes=20_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert open_folder(tmp_path).keys() == checkpoints.draw(cfg).keys()
