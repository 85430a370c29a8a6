"""Rows out of shards: a function of seed and number, every document once an epoch, nothing damaged among them."""

import os
import shutil
import uuid
from itertools import pairwise

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.config import ConfigError, DataConfig
from dsjax.data import blocks, places, windows
from dsjax.data.build import build
from dsjax.data.manifest import load_manifest
from dsjax.data.pipeline import batches, load_corpus, train_rows
from dsjax.data.places import Place, ShardCache

T = 32
SEEN = settings(deadline=None, max_examples=12)


@pytest.fixture(autouse=True, scope="module")
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_TOKENS", 300)
        patch.setattr(windows, "WINDOW_TOKENS", 1500)
        patch.setattr(windows, "WINDOW_ROWS", 8)
        patch.setattr(windows, "GROUP", 2)
        patch.setattr(places, "WAIT_S", 0.0)
        yield


@pytest.fixture(scope="module")
def built(small, texts, tmp_path_factory):
    """Seven shards or so, of bytes, and a second, smaller folder."""
    folder = tmp_path_factory.mktemp("shards")
    given = dict(workers=1, progress=False, heldout_fraction=0.1, shard_tokens=5000)
    build([str(texts)], str(folder / "a"), **given)
    build([str(texts / "00*.txt")], str(folder / "b"), **given)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


def rows_of(*sources, cache, seed=0, say=None, **options):
    config = DataConfig(sources=tuple(map(str, sources)), cache=cache, tokenizer="bytes", **options)
    return train_rows(load_corpus(config, 262, places.Path(cache) / uuid.uuid4().hex), config, T, seed, say)


@pytest.fixture(scope="module")
def reference(built, cache):
    """All rows of two epochs of each way to read, in order."""
    kept = {}

    def get(**options):
        key = tuple(options.items())
        if key not in kept:
            rows = rows_of(built / "a", cache=cache, **options)
            kept[key] = [rows[i] for i in range(2 * rows.sources[0].rows_an_epoch)]
        return kept[key]

    return get


def documents(folder, cache):
    place = Place(str(folder))
    found = []
    for shard in load_manifest(place).train:
        reader = ShardCache(cache, 1).open(place, shard)
        tokens = np.concatenate(reader.read(list(range(shard.blocks))))
        found += [d.tolist() for d in np.split(tokens, np.cumsum(reader.lengths)[:-1])]
    return found


def pairs(rows) -> list[tuple[int, int]]:
    """Pairs of neighbouring tokens inside a segment, sorted."""
    found = []
    for row in rows:
        tokens, segments = row["tokens"], row["segment_ids"]
        inside = (segments[:-1] == segments[1:]) & (segments[1:] > 0)
        found += zip(tokens[:-1][inside].tolist(), tokens[1:][inside].tolist())
    return sorted(found)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_each_epoch_has_every_transition_once_in_another_order(packing, built, cache, reference):
    rows = reference(packing=packing)
    n = len(rows) // 2
    wanted = sorted(pair for d in documents(built / "a", cache) for pair in pairwise([0, *d, 1]))
    assert pairs(rows[:n]) == wanted == pairs(rows[n:])
    assert not np.array_equal(rows[0]["tokens"], rows[n]["tokens"])
    assert all((row["segment_ids"] > 0).any() for row in rows)
    assert np.mean([(row["segment_ids"] == 0).mean() for row in rows]) < 0.06  # 2 of 32 tokens; windows are tiny here


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_fim_turns_its_rate_of_the_documents_and_gives_them_back(packing, built, cache, reference):
    rows = reference(packing=packing, fim_rate=0.3)
    n = len(rows) // 2
    tokens = np.concatenate([row["tokens"] for row in rows[:n]])
    whole = documents(built / "a", cache)
    begins = int((tokens == 3).sum())
    assert int(0.3 * len(whole)) <= begins <= int(0.3 * len(whole)) + 4  # those at a row's end are in two rows
    pieces = []
    for row in rows[:n]:
        for s in range(1, row["segment_ids"].max() + 1):
            piece = row["tokens"][row["segment_ids"] == s].tolist()
            if piece[0] == 0 and piece[-1] == 1 and piece[1] == 3:
                hole, end = piece.index(4), piece.index(5)
                pieces.append(piece[2:hole] + piece[end + 1 : -1] + piece[hole + 1 : end])
    assert pieces and all(p in whole for p in pieces)


@given(
    draws=st.lists(st.integers(0, 10**6), min_size=1, max_size=8),
    packing=st.sampled_from(["concat", "best_fit"]),
    fim_rate=st.sampled_from([0.0, 0.3]),
)
@SEEN
def test_a_row_is_the_same_whoever_asks_and_in_whatever_order(draws, packing, fim_rate, built, cache, reference):
    options = {"packing": packing} | ({"fim_rate": fim_rate} if fim_rate else {})
    whole, rows = reference(**options), rows_of(built / "a", cache=cache, **options)
    for i in draws:
        row = rows[i % len(whole)]
        for name, array in whole[i % len(whole)].items():
            np.testing.assert_array_equal(array, row[name])


@given(
    first=st.integers(0, 12), threads=st.integers(1, 4), shares=st.sampled_from([[(0, 1, 2, 3)], [(3,), (0, 2), (1,)]])
)
@SEEN
def test_no_row_is_lost_repeated_or_changed_wherever_a_run_goes_on(first, threads, shares, built, cache):
    """A mixture, readers of parts of each batch, read ahead, from any step on."""
    sources = (built / "a", f"{built / 'b'}:2.5")
    whole = rows_of(*sources, cache=cache)
    readers = [
        batches(
            rows_of(*sources, cache=cache),
            lambda s: (8 * s, 8 * s + 8),
            first,
            16,
            micro_batch=4,
            mine=mine,
            threads=threads,
        )
        for mine in shares
    ]
    for step, parts in zip(range(first, 16), zip(*readers, strict=True), strict=True):
        for mine, (number, arrays) in zip(shares, parts):
            wanted = [8 * step + 4 * half + i for half in (0, 1) for i in mine]
            assert number == step
            np.testing.assert_array_equal(arrays["tokens"], [whole[i]["tokens"] for i in wanted])


def test_a_mixture_has_its_shares_in_tokens_and_each_source_its_own_epochs(built, cache):
    rows = rows_of(built / "a", f"{built / 'b'}:2.5", cache=cache)
    a, b = (source.rows_an_epoch for source in rows.sources)
    n = 4 * (a + b)
    counts = rows.mixture.counts(n)
    assert counts[1] == pytest.approx(n * 2.5 * b / (a + 2.5 * b), abs=1)
    alone = rows_of(built / "a", cache=cache)
    mixed = [rows[i]["tokens"] for i in range(n) if rows.mixture[i][0] == 0]
    np.testing.assert_array_equal(mixed[: a // 2], [alone[i]["tokens"] for i in range(a // 2)])


def test_what_is_in_memory_is_a_few_windows_and_a_row_far_away_costs_one(built, cache, monkeypatch):
    rows = rows_of(built / "a", cache=cache)
    source, loaded = rows.sources[0], []
    pack = source._packed
    source.windows.make = lambda key: (loaded.append(key), pack(source.groups[key[:2]], *key))[1]
    monkeypatch.setattr(source.windows, "ahead", lambda key: None)
    rows[10**12 + 7]
    assert len(loaded) == 1
    for i in range(3 * source.rows_an_epoch):
        rows[i]
    assert len(source.windows.values) <= windows.KEPT and len(loaded) == 1 + 3 * source.windows_of.sum()
    assert source.windows_of.sum() > windows.KEPT


@pytest.fixture
def copied(built, tmp_path):
    shutil.copytree(built / "a", tmp_path / "a")
    return tmp_path / "a"


def change(path, at=-1000):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x55
    path.write_bytes(data)


def middle(path) -> int:
    """Where tokens lie: much of so small a file is padding."""
    return len(path.read_bytes()[: 1 << 16].rstrip(b"\0")) // 2


@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_a_shard_damaged_before_the_run_ends_it_in_one_line(damage, copied, tmp_path):
    path = copied / "train-000002.array_record"
    if damage == "changed":
        change(path)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.unlink()
    said = {"changed": "sha256 .*, expected ", "cut": "bytes, expected ", "gone": "cannot be read .No such file"}[
        damage
    ]
    rows = rows_of(copied, cache=str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=rf"a/train-000002.array_record: .*{said}.*copy it again or build") as caught:
        for _ in batches(rows, lambda s: (8 * s, 8 * s + 8), 0, rows.sources[0].rows_an_epoch // 8):
            pass
    assert "\n" not in str(caught.value)


def test_a_shard_that_changes_during_the_run_is_seen_at_the_next_read(copied, tmp_path):
    place, cache = Place(str(copied)), ShardCache(str(tmp_path / "cache"), 1)
    reader = cache.open(place, load_manifest(place).train[1])
    reader.read([0])
    rows = rows_of(copied, cache=str(tmp_path / "cache"))
    for i in range(rows.sources[0].rows_an_epoch):  # all were verified
        rows[i]
    path = copied / "train-000001.array_record"
    change(path, middle(path))
    with pytest.raises(blocks.BadShard, match=r"changed since it was verified \(was .* bytes, time "):
        reader.read([0])
    with pytest.raises(ConfigError, match=r"train-000001.array_record: (changed since it was verified|sha256)"):
        for i in range(rows.sources[0].rows_an_epoch, 3 * rows.sources[0].rows_an_epoch):
            rows[i]


def test_damage_that_leaves_size_and_time_alone_is_seen_by_checksum(copied, tmp_path):
    cache = str(tmp_path / "cache")
    for shard in load_manifest(Place(str(copied))).train:
        ShardCache(cache, 1).get(Place(str(copied)), shard)
    path = copied / "train-000000.array_record"
    stat = path.stat()
    change(path, middle(path))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    rows = rows_of(copied, cache=cache)
    with pytest.raises(ConfigError, match=r"train-000000.array_record: .*damaged"):
        for i in range(rows.sources[0].rows_an_epoch):
            rows[i]


def test_a_bad_shard_is_left_out_if_asked_and_what_remains_is_whole(copied, built, cache, tmp_path):
    change(copied / "train-000002.array_record")
    whole, said = documents(built / "a", cache), []
    rows = rows_of(copied, cache=str(tmp_path / "cache"), say=said.append, on_error="skip")
    n = rows.sources[0].rows_an_epoch
    epoch = [rows[i] for i in range(n)]
    assert len(said) == 1 and "train-000002.array_record: sha256" in said[0] and "left out (1 of" in said[0]
    assert list(rows.left_out) == [f"{copied}/train-000002.array_record"]
    known = {pair for d in whole for pair in pairwise([0, *d, 1])}
    assert set(pairs(epoch)) <= known and all((row["segment_ids"] > 0).any() for row in epoch)
    again = rows_of(copied, cache=str(tmp_path / "cache"), on_error="skip")
    for i in (n - 1, 0, n // 2):
        np.testing.assert_array_equal(again[i]["tokens"], epoch[i]["tokens"])


def test_no_shard_left_is_said(copied, tmp_path):
    for path in copied.glob("train-*.array_record"):
        change(path)
    with pytest.raises(ConfigError, match="no shard of it can be read"):
        rows_of(copied, cache=str(tmp_path / "cache"), on_error="skip")[0]


@pytest.fixture
def remote(built):
    root = f"memory://{uuid.uuid4().hex}"
    memory = fsspec.filesystem("memory")
    for path in (built / "a").iterdir():
        memory.pipe_file(f"{root}/{path.name}", path.read_bytes())
    yield root
    memory.rm(root, recursive=True)


def test_shards_from_afar_give_the_same_rows_through_a_cache_of_bounded_size(remote, tmp_path, reference):
    size = max(s.size for s in load_manifest(Place(remote)).train)
    folder = tmp_path / "cache"
    rows = rows_of(remote, cache=str(folder), cache_gib=4 * size / 2**30, packing="concat")
    for i, wanted in enumerate(reference(packing="concat")):
        np.testing.assert_array_equal(rows[i]["tokens"], wanted["tokens"])
        assert len(list(folder.glob("*.array_record"))) <= 6
    assert len(load_manifest(Place(remote)).train) > 6
    with pytest.raises(ConfigError, match=r"data.cache_gib=1e-06: expected at least "):
        rows_of(remote, cache=str(folder), cache_gib=1e-6)


def test_what_arrives_damaged_is_refused_and_a_fetch_that_fails_is_tried_again(remote, tmp_path, monkeypatch):
    place, cache = Place(remote), ShardCache(str(tmp_path), 1)
    shard = load_manifest(place).train[0]
    real, fail = Place.digest, [2]

    def digest(self, *args):
        if fail[0]:
            fail[0] -= 1
            raise TimeoutError("slow")
        return real(self, *args)

    monkeypatch.setattr(Place, "digest", digest)
    path, _ = cache.get(place, shard)
    assert path.stat().st_size == shard.size and not list(tmp_path.glob(".*.tmp"))
    path.unlink()
    fail[0] = 99
    with pytest.raises(blocks.BadShard, match=r"cannot be fetched in 4 tries \(TimeoutError: slow\)"):
        cache.get(place, shard)
    fail[0] = 0
    data = bytearray(place.read(shard.name))
    data[5000] ^= 1
    fsspec.filesystem("memory").pipe_file(place.name(shard.name), bytes(data))
    with pytest.raises(blocks.BadShard, match="sha256"):
        cache.get(place, shard)
    assert not list(tmp_path.glob("*.array_record"))


def test_the_reader_says_what_it_waits_for(remote, tmp_path, monkeypatch):
    rows, seen = rows_of(remote, cache=str(tmp_path)), []
    real = Place.digest
    monkeypatch.setattr(Place, "digest", lambda *args: (seen.append(rows.reading()), real(*args))[1])
    assert rows.reading() == ""
    rows[0]
    assert f"shard {remote}/train-" in seen[0]


def test_shards_and_settings_that_do_not_go_together_are_one_line(built, cache, texts, tmp_path):
    def refused(match, sources, size=262, **options):
        config = DataConfig(sources=tuple(map(str, sources)), cache=cache, **options)
        with pytest.raises(ConfigError, match=match):
            load_corpus(config, size, tmp_path / "run", progress=False)

    (tmp_path / "tok").mkdir()
    other = DataConfig(sources=(str(texts),), heldout_fraction=0.1)
    load_corpus(other, 300, tmp_path / "tok", progress=False)
    build([str(texts)], str(tmp_path / "c"), tokenizer=str(tmp_path / "tok"), workers=1, progress=False)
    refused("have different tokenizers; expected shards of one", (built / "a", tmp_path / "c"))
    refused("is a folder of shards and the rest is not", (built / "a", texts))
    refused(r"model.vocab_size=261: data.tokenizer=.*/a needs at least 262", (built / "a",), size=261)
    refused(r"data.tokenizer=bytes: not the one of data.sources=", (tmp_path / "c",), size=300, tokenizer="bytes")
    refused(r"data.split_rate=0.5: .*/a was built with 0.0", (built / "a",), split_rate=0.5)
    refused("no manifest.json there; expected a folder that", ("memory://nothing/here",))
    load_corpus(DataConfig(sources=(str(built / "a"),), cache=cache), 262, tmp_path / "run")
    refused("tokenizer.json: not the tokenizer of data.sources=", (tmp_path / "c",), size=300)
    shutil.copytree(built / "a", tmp_path / "a")
    manifest = tmp_path / "a" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"seed": 0', '"seed": 1'))
    refused("manifest.json: not as it was written", (tmp_path / "a",))
    manifest.write_text("{")
    refused("manifest.json: damaged, or no manifest", (tmp_path / "a",))


def test_a_row_names_the_documents_it_holds(built, cache):
    rows = rows_of(built / "a", cache=cache)
    (source,) = rows.sources
    for row in range(0, source.rows_an_epoch, 7):
        texts = bytes(t for t in rows[row]["tokens"] if t < 256)
        for name in rows.documents_of(row):
            shard, _, block, _, document = name.rsplit(" ", 4)
            number = next(k for k in range(len(source.shards)) if source.name(k) == shard)
            reader = source._opened(number)
            lengths = reader.block_lengths(int(block))
            begin = int(lengths[: int(document)].sum())
            tokens = bytes(reader.read([int(block)])[0][begin : begin + lengths[int(document)]].astype(np.uint8))
            pieces = {tokens[k : k + 4] for k in range(max(1, len(tokens) - 3))}
            assert any(piece in texts for piece in pieces)
