"""A build is the same, byte for byte, whatever the workers and whatever killed it on the way."""

import hashlib
import json
import shutil
import sys
import uuid

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.config import ConfigError, DataConfig
from dsjax.data import blocks
from dsjax.data import build as building
from dsjax.data.build import build
from dsjax.data.corpus import load_corpus
from dsjax.data.manifest import load_manifest, load_tokenizer, stored_sources, verify
from dsjax.data.places import Place, ShardCache


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_TOKENS", 1000)


def content(folder) -> dict[str, str]:
    place = Place(str(folder))
    return {name: hashlib.sha256(place.read(name)).hexdigest() for name in place.files() if name != ".lock"}


def options(run_folder, **changes) -> dict:
    whole = dict(tokenizer=str(run_folder), shard_tokens=4000, heldout_fraction=0.1, progress=False)
    return whole | dict(workers=1) | changes


@pytest.fixture(scope="module")
def built(texts, corpus, run_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_TOKENS", 1000)
        build([str(texts)], str(out), **options(run_folder))
    return out


def tokens_of(place: Place, shards, tmp_path) -> list[np.ndarray]:
    documents = []
    for shard in shards:
        reader = ShardCache(str(tmp_path), 1).open(place, shard)
        tokens = np.concatenate(reader.read(list(range(shard.blocks))))
        documents += np.split(tokens, np.cumsum(reader.lengths)[:-1])
    return documents


def test_shards_hold_the_documents_in_order_and_the_same_ones_apart_as_a_run_on_text(built, corpus, texts, tmp_path):
    place = Place(str(built))
    manifest = load_manifest(place)
    assert len(manifest.train) >= 3 and all(s.tokens >= 4000 for s in manifest.train[:-1])
    for part, expected in (("train", corpus.train), ("heldout", corpus.heldout)):
        found = tokens_of(place, getattr(manifest, part), tmp_path)
        decode = load_tokenizer(place, manifest).decode
        assert [decode(d) for d in found] == [corpus.tokenizer.decode(expected[i]) for i in range(len(expected))]
        assert manifest.total(part) == corpus.facts[part]
    assert manifest.text_sha256 == corpus.facts["sha256"] and manifest.gzip_bpb == corpus.facts["gzip_bpb"]
    assert verify(place, manifest) == []


def test_two_processes_make_the_same_files(built, texts, run_folder, tmp_path):
    build([str(texts)], str(tmp_path / "out"), **options(run_folder, workers=2))
    assert content(tmp_path / "out") == content(built)


def test_a_build_killed_anywhere_goes_on_and_ends_the_same(built, texts, run_folder, tmp_path, monkeypatch):
    class Killed(BaseException): ...

    real, made = Place.put, []
    for kill_at in (1, 2, 4):
        out = tmp_path / f"out{kill_at}"
        count = iter(range(100))

        def put(self, draft, file, count=count, kill_at=kill_at):
            if next(count) == kill_at:
                raise Killed
            real(self, draft, file)

        monkeypatch.setattr(Place, "put", put)
        with pytest.raises(Killed):
            build([str(texts)], str(out), **options(run_folder))
        with pytest.raises(ConfigError, match="its build has not ended"):
            stored_sources([str(out)])
        monkeypatch.setattr(Place, "put", lambda self, draft, file: (made.append(file), real(self, draft, file)))
        whole = [p.name for p in out.glob("train-*.array_record")]
        made.clear()
        build([str(texts)], str(out), **options(run_folder))
        assert content(out) == content(built) and not set(whole) & set(made)
        monkeypatch.setattr(Place, "put", real)


@pytest.mark.parametrize("number", [0, 1])
def test_a_damaged_shard_of_an_unfinished_build_is_made_again(number, built, texts, run_folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        build_and_stop(patch, [str(texts)], str(out), options(run_folder))
    path = out / f"train-{number:06}.array_record"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    build([str(texts)], str(out), **options(run_folder))
    assert content(out) == content(built)


def build_and_stop(patch, sources, out, given):
    def finish(*args):
        raise KeyboardInterrupt

    patch.setattr(building.Build, "_finish", finish)
    with pytest.raises(KeyboardInterrupt):
        build(sources, out, **given)


def test_what_does_not_fit_is_one_line(built, texts, run_folder, tmp_path, monkeypatch):
    def refused(match, sources=(str(texts),), out=built, **changes):
        with pytest.raises(ConfigError, match=match):
            build(list(sources), str(out), **options(run_folder, **changes))

    refused(r"its build began with seed=0, not 3; repeat that, delete the folder", seed=3)
    refused("a build takes no weight; it belongs to training", sources=[f"{texts}:2"])
    refused("expected an empty folder, or one that", out=texts)
    refused("no such file or folder", sources=["nowhere.txt"], out=tmp_path / "a")
    (tmp_path / "one.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    refused("one.jsonl line 2: no field 'text'", sources=[str(tmp_path / "one.jsonl")], out=tmp_path / "b")
    assert not (tmp_path / "b" / "manifest.json").exists() and not list((tmp_path / "b").glob("*.array_record*"))
    changed = tmp_path / "changed"
    shutil.copytree(texts, changed)
    with monkeypatch.context() as patch:
        build_and_stop(patch, [str(changed)], str(tmp_path / "c"), options(run_folder))
    (changed / "003.txt").write_text("another text")
    refused("not the text that the build in .* began with", sources=[str(changed)], out=tmp_path / "c")


def test_a_whole_build_is_left_alone(built, texts, run_folder):
    before = {p: p.stat().st_mtime_ns for p in built.iterdir() if p.name != ".lock"}
    build([str(texts)], str(built), **options(run_folder))
    assert {p: p.stat().st_mtime_ns for p in built.iterdir() if p.name != ".lock"} == before


def test_one_text_gives_its_tail_and_many_go_by_the_hash_of_their_keys(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("line of text\n" * 100)
    given = dict(workers=1, progress=False, heldout_fraction=0.05)
    assert build([str(tmp_path / "a.txt")], str(tmp_path / "a"), **given).total("heldout")["bytes"] == 5 * 13
    monkeypatch.setattr(building, "SMALL", 10)
    records = "".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(300))
    (tmp_path / "b.jsonl").write_text(records)
    source = str(tmp_path / "b.jsonl")
    config = DataConfig(sources=(source,), tokenizer="bytes", heldout_fraction=0.05)
    facts = load_corpus(config, 262, tmp_path / "run", progress=False).facts
    manifest = build([source], str(tmp_path / "b"), **given)
    assert (manifest.total("train"), manifest.total("heldout")) == (facts["train"], facts["heldout"])
    with pytest.raises(ConfigError, match=r"--heldout-fraction=1e-09: it leaves no held-out document of 300"):
        build([source], str(tmp_path / "c"), **given | dict(heldout_fraction=1e-9))


def test_a_build_behind_a_url_is_the_same(built, texts, run_folder):
    url = f"memory://{uuid.uuid4().hex}/out"
    build([str(texts)], url, **options(run_folder))
    assert content(url) == content(built)
    fsspec.filesystem("memory").rm(url, recursive=True)


def test_a_missing_file_system_is_named_with_what_to_install(monkeypatch):
    known = sys.modules["fsspec.registry"].known_implementations
    monkeypatch.setitem(known, "gs", {"class": "no_such_package.GCS", "err": "x"})
    with pytest.raises(ConfigError, match=r"gs://b/x: gs:// needs a package; `pip install gcsfs`"):
        Place("gs://b/x")
    with pytest.raises(ConfigError, match=r"nosuch://x: .*expected a path, gs://"):
        Place("nosuch://x")


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    """A file of several blocks, and what is in it."""
    folder = tmp_path_factory.mktemp("shard")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_TOKENS", 50)
        writer = blocks.ShardWriter(folder / "x.array_record", 1 << 17)
        documents = [np.arange(n, dtype=np.int32) * 3001 % (1 << 17) for n in (30, 1, 80, 7, 44)]
        for d in documents:
            writer.add(d, 10)
        return folder / "x.array_record", writer.close("x.array_record"), documents


def test_a_shard_gives_back_its_documents_of_three_bytes_a_token(shard):
    path, facts, documents = shard
    reader = blocks.ShardReader(path, facts)
    assert facts.blocks == 2 and facts.documents == 5 and facts.bytes == 50 and facts.tokens == 162
    np.testing.assert_array_equal(np.concatenate(reader.read([0, 1])), np.concatenate(documents))
    np.testing.assert_array_equal(reader.read([1])[0], np.concatenate(documents[3:]))
    assert [reader.block_lengths(b).tolist() for b in (0, 1)] == [[30, 1, 80], [7, 44]]


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_no_damage_gives_other_tokens(shard, tmp_path_factory, data):
    """Any byte changed, any end cut off: it is refused, or it was not in what is read."""
    path, facts, documents = shard
    whole = path.read_bytes()
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(whole) - 1))
        broken = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
    else:
        broken = whole[: data.draw(st.integers(0, len(whole) - 1))]
    copy = tmp_path_factory.mktemp("broken") / "x.array_record"
    copy.write_bytes(broken)
    try:
        found = np.concatenate(blocks.ShardReader(copy, facts).read([0, 1]))
    except blocks.BadShard:
        return
    np.testing.assert_array_equal(found, np.concatenate(documents))
