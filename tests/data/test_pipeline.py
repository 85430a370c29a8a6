"""A corpus is the same at every call; a batch is a function of seed and step."""

import gzip
import json
import lzma
import shutil
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.config import ConfigError, DataConfig
from dsjax.data.corpus import survey_sources
from dsjax.data.pipeline import TrainRows, batches, heldout_rows, load_corpus
from dsjax.data.tokenizer import PAD, Tokenizer

T = 32


def ramp(step: int) -> tuple[int, int]:
    """Four rows a step for five steps, then eight."""
    start = 4 * step + 4 * max(step - 5, 0)
    return start, start + (4 if step < 5 else 8)


def rows_of(corpus, seed=0, **options) -> TrainRows:
    return TrainRows(corpus, DataConfig(**options), T, seed)


def transitions(arrays) -> list[tuple[int, int]]:
    """Pairs of neighbouring tokens inside a segment, of rows [R, T], sorted."""
    tokens, segments = arrays["tokens"], arrays["segment_ids"]
    inside = (segments[:, :-1] == segments[:, 1:]) & (segments[:, 1:] > 0)
    return sorted(zip(tokens[:, :-1][inside].tolist(), tokens[:, 1:][inside].tolist()))


def wanted_transitions(corpus, documents) -> list[tuple[int, int]]:
    whole = [[corpus.tokenizer.bos_id, *documents[i].tolist(), corpus.tokenizer.eos_id] for i in range(len(documents))]
    return sorted(pair for tokens in whole for pair in pairwise(tokens))


def stack(rows) -> dict[str, np.ndarray]:
    rows = list(rows)
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def one_epoch(rows: TrainRows) -> int:
    rows[0]
    return rows.first_rows[1]


def test_training_and_heldout_documents_are_apart_and_cover_the_text(corpus, texts):
    trained = [corpus.tokenizer.decode(corpus.train[i]) for i in range(len(corpus.train))]
    held = [corpus.tokenizer.decode(corpus.heldout[i]) for i in range(len(corpus.heldout))]
    everything = [path.read_bytes().decode() for path in sorted(texts.iterdir())]
    assert sorted(trained + held) == sorted(everything) and not set(trained) & set(held)
    assert 3 <= len(held) <= 24 and "".join(held).encode() == corpus.heldout_text


def test_facts_say_what_the_corpus_is(corpus):
    facts, text = json.loads(json.dumps(corpus.facts)), corpus.heldout_text
    assert facts["train"]["documents"] + facts["heldout"]["documents"] == 120
    assert facts["heldout"]["bytes"] == len(text) and facts["heldout"]["tokens"] == corpus.heldout.lengths.sum()
    assert facts["gzip_bpb"] == 8 * len(gzip.compress(text, 9, mtime=0)) / len(text)
    assert facts["xz_bpb"] == 8 * len(lzma.compress(text, preset=9)) / len(text)
    assert facts["tokenizer"] == "bpe" and facts["vocab_size"] == 320 and len(facts["sha256"]) == 64
    assert 1 < facts["bytes_per_token"] < 8 and facts["python"].startswith("3.") and facts["skipped"] == {}


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_an_epoch_has_every_transition_once_and_the_next_one_too(corpus, packing):
    rows = rows_of(corpus, packing=packing)
    n = one_epoch(rows)
    first, second = stack(rows[i] for i in range(n)), stack(rows[i] for i in range(n, 2 * n))
    assert transitions(first) == wanted_transitions(corpus, corpus.train)
    if packing == "best_fit":  # the same lengths: the same number of rows
        assert transitions(second) == transitions(first)
    assert not np.array_equal(first["tokens"], second["tokens"])


def test_heldout_rows_have_every_transition_once(corpus):
    arrays = heldout_rows(corpus, T)
    assert transitions(arrays) == wanted_transitions(corpus, corpus.heldout)
    assert arrays["tokens"].shape[1] == T and (arrays["segment_ids"][:-1] > 0).all()


def test_positions_start_anew_with_every_segment(corpus):
    arrays = stack(rows_of(corpus)[i] for i in range(40))
    segments, positions = arrays["segment_ids"], arrays["positions"]
    same = segments[:, 1:] == segments[:, :-1]
    assert (positions[:, 0] == 0).all() and (positions[:, 1:][~same] == 0).all()
    used = segments[:, 1:] > 0
    assert (np.diff(positions)[same & used] == 1).all()


@given(row=st.integers(0, 3000), seed=st.integers(0, 3), packing=st.sampled_from(["concat", "best_fit"]))
@settings(deadline=None, max_examples=15)
def test_a_row_is_a_function_of_seed_and_number(corpus, row, seed, packing):
    """Asked for alone, or after others, FIM and weights and epochs notwithstanding."""
    options = {"packing": packing, "fim_rate": 0.5}
    alone = rows_of(corpus, seed, **options)[row]
    used = rows_of(corpus, seed, **options)
    for other in (2000, 0, row + 1, row):
        again = used[other]
    for name in alone:
        np.testing.assert_array_equal(alone[name], again[name])


def test_seeds_give_other_rows(corpus):
    assert not np.array_equal(rows_of(corpus, 0)[0]["tokens"], rows_of(corpus, 1)[0]["tokens"])


@pytest.mark.parametrize("shares", [[(0, 1, 2, 3)], [(0, 1), (2, 3)], [(3,), (0, 2), (1, 3)]])
def test_readers_of_some_rows_of_each_micro_batch_read_the_same_rows(corpus, shares):
    """Three readers may need a row twice, and in any order."""
    rows = rows_of(corpus, fim_rate=0.3)
    readers = [batches(rows, ramp, 0, 12, micro_batch=4, mine=mine) for mine in shares]
    for wanted, parts in zip(range(12), zip(*readers, strict=True), strict=True):
        start, stop = ramp(wanted)
        for mine, (step, arrays) in zip(shares, parts):
            assert step == wanted
            numbers = [first + i for first in range(start, stop, 4) for i in mine]
            for name in ("tokens", "segment_ids", "positions"):
                np.testing.assert_array_equal(arrays[name], [rows[i][name] for i in numbers])


@pytest.mark.parametrize("restart", [1, 5, 11])
def test_a_restart_goes_on_with_the_same_batches(corpus, restart):
    whole = list(batches(rows_of(corpus), ramp, 0, 12))
    rest = list(batches(rows_of(corpus), ramp, restart, 12))
    assert [step for step, _ in rest] == list(range(restart, 12))
    for (_, a), (_, b) in zip(whole[restart:], rest):
        np.testing.assert_array_equal(a["tokens"], b["tokens"])


def same(a, b) -> bool:
    arrays = [(c.train.tokens, c.train.lengths, c.heldout.tokens, c.heldout.lengths) for c in (a, b)]
    equal = all(np.array_equal(x, y) for x, y in zip(*arrays))
    texts = [(c.facts, c.heldout_text, c.tokenizer.dumps()) for c in (a, b)]
    return equal and texts[0] == texts[1]


@pytest.fixture
def copied(run_folder, corpus, texts, tmp_path):
    """A run folder of one's own, and how its corpus is loaded."""
    shutil.copytree(run_folder, tmp_path / "run")
    config = DataConfig(sources=(str(texts),), heldout_fraction=0.1)
    return tmp_path / "run", lambda: load_corpus(config, 320, tmp_path / "run", progress=False)


def test_a_second_call_reads_the_same_corpus_and_writes_nothing(copied, corpus):
    folder, load = copied
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert same(load(), corpus)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_one_who_may_not_make_the_corpus_reads_it_or_says_what_is_missing(copied, texts, corpus):
    folder, _ = copied
    config = DataConfig(sources=(str(texts),), heldout_fraction=0.1)
    assert same(load_corpus(config, 320, folder, progress=False, make=False), corpus)
    (folder / "data" / "train.tokens").unlink()
    before = sorted(folder.rglob("*"))
    with pytest.raises(ConfigError, match=r"data: not the tokens of data.sources=.*; expected the same text, Python"):
        load_corpus(config, 320, folder, progress=False, make=False)
    assert sorted(folder.rglob("*")) == before


FILES = ["tokenizer.json", "data/tokenizer.from.json", "data/facts.json", "data/heldout.txt"]
FILES += [f"data/{part}.{kind}" for part in ("train", "heldout") for kind in ("tokens", "lengths.npy")]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_cut_or_damaged_file_is_made_again(name, copied, corpus):
    folder, load = copied
    data = (folder / name).read_bytes()
    for broken in (None, b"", data[: len(data) // 2], data[:-1] + b"\x7f"):
        (folder / name).unlink()
        if broken is not None:
            (folder / name).write_bytes(broken)
        assert same(load(), corpus)
        assert same(load(), corpus)


def test_a_corpus_killed_at_any_write_is_the_same_in_the_end(copied, corpus, monkeypatch):
    folder, load = copied

    class Killed(BaseException): ...

    for kill_at in range(9):
        shutil.rmtree(folder)
        count = iter(range(100))

        def replace(source, target, count=count, kill_at=kill_at):
            if next(count) == kill_at:
                raise Killed
            shutil.move(source, target)

        with monkeypatch.context() as patch:
            patch.setattr("dsjax.files.os.replace", replace)
            try:
                load()
            except Killed:
                assert kill_at < 8
        assert same(load(), corpus)


def test_a_run_folder_of_other_text_is_refused(copied, texts, tmp_path):
    folder, _ = copied
    (tmp_path / "other.txt").write_text("another text\n" * 50)
    for sources, size in ((("other.txt",), 320), ((str(texts),), 300)):
        config = DataConfig(sources=tuple(str(tmp_path / s) for s in sources), heldout_fraction=0.1)
        with pytest.raises(ConfigError, match=r"tokenizer.json: made from other text .* another --run, or delete"):
            load_corpus(config, size, folder, progress=False)


def test_a_corpus_of_bytes_or_of_an_existing_tokenizer(texts, corpus, run_folder, tmp_path):
    for kind, size in (("bytes", 262), (str(run_folder / "tokenizer.json"), 320)):
        folder = tmp_path / str(size)
        config = DataConfig(sources=(str(texts),), heldout_fraction=0.1, tokenizer=kind)
        other = load_corpus(config, size, folder, progress=False)
        assert other.heldout_text == corpus.heldout_text and other.facts["vocab_size"] == size
        assert other.tokenizer.decode(other.train[0]) == corpus.tokenizer.decode(corpus.train[0])
        assert same(load_corpus(config, size, folder, progress=False), other)


def test_a_run_keeps_what_the_folder_of_its_tokenizer_says(texts, run_folder, tmp_path):
    hub = tmp_path / "hub"
    hub.mkdir()
    shutil.copyfile(run_folder / "tokenizer.json", hub / "tokenizer.json")
    (hub / "tokenizer_config.json").write_text(json.dumps({"eos_token": PAD}), "utf-8")
    (hub / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5]}), "utf-8")
    config = DataConfig(sources=(str(texts),), heldout_fraction=0.1, tokenizer=str(hub))
    first, again = (load_corpus(config, 320, tmp_path / "run", progress=False) for _ in range(2))
    for tokenizer in (first.tokenizer, again.tokenizer, Tokenizer.load(tmp_path / "run")):
        assert tokenizer.eos_id == 2 and tokenizer.eos_ids == (2, 1, 5)


def test_a_large_corpus_trains_its_tokenizer_on_a_part(texts, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("dsjax.data.corpus.BPE_BYTES", 10_000)
    config = DataConfig(sources=(str(texts),), heldout_fraction=0.1)
    part = load_corpus(config, 320, tmp_path, progress=False)
    assert part.tokenizer.dumps() != corpus.tokenizer.dumps() and part.facts["train"]["bytes"] > 20_000
    assert part.facts["sha256"] == corpus.facts["sha256"]


def test_a_vocabulary_too_small_is_said_before_anything_is_read(tmp_path):
    with pytest.raises(ConfigError, match=r"model.vocab_size=200: data.tokenizer=bpe needs at least 262"):
        load_corpus(DataConfig(sources=("none.txt",)), 200, tmp_path, progress=False)


def test_weights_repeat_documents_in_an_epoch(tmp_path):
    (tmp_path / "a.txt").write_text("aaaa\n")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": f"b{i}"}) + "\n" for i in range(20)))
    config = DataConfig(sources=(f"{tmp_path}/b.jsonl", f"{tmp_path}/a.txt:3"), tokenizer="bytes")
    corpus = load_corpus(config, 262, tmp_path / "run", progress=False)
    rows = rows_of(corpus)
    tokens = np.concatenate([rows[i]["tokens"][:-1] for i in range(one_epoch(rows))])
    assert corpus.train.weights.sum() in (22, 20) and (tokens == 6 + ord("a")).sum() in (12, 0)


def test_one_text_gives_its_tail(tmp_path):
    (tmp_path / "a.txt").write_text("line of text\n" * 100)
    config = DataConfig(sources=(str(tmp_path / "a.txt"),), tokenizer="bytes", heldout_fraction=0.05)
    corpus = load_corpus(config, 262, tmp_path / "run", progress=False)
    assert corpus.heldout_text == b"line of text\n" * 5 and len(corpus.train) == len(corpus.heldout) == 1
    assert corpus.facts["train"] == {"documents": 1, "bytes": 13 * 95, "tokens": 13 * 95}


def test_copies_of_a_record_are_on_one_side(tmp_path):
    records = [json.dumps({"text": f"text {i % 40}"}) for i in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join(records))
    survey = survey_sources(DataConfig(sources=(str(tmp_path / "a.jsonl"),), heldout_fraction=0.2))
    assert (survey.heldout.reshape(5, 40) == survey.heldout[:40]).all() and 0 < survey.heldout[:40].sum() < 20


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_both_sides_have_a_document(fraction, tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    survey = survey_sources(DataConfig(sources=(str(tmp_path),), heldout_fraction=fraction))
    assert survey.heldout.sum() == 1


def test_an_empty_or_tiny_corpus_is_said(tmp_path):
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(ConfigError, match=r"data.sources=.*a.txt: no text in them \(1 empty\)"):
        survey_sources(DataConfig(sources=(str(tmp_path / "a.txt"),)))
    (tmp_path / "a.txt").write_text("one\n")
    with pytest.raises(ConfigError, match="one document of 4 characters is too short to be split"):
        survey_sources(DataConfig(sources=(str(tmp_path / "a.txt"),)))
    (tmp_path / "a.txt").write_text("one\ntwo\n" * 9)
    with pytest.raises(ConfigError, match="the weights leave less than one training document"):
        survey_sources(DataConfig(sources=(f"{tmp_path}/a.txt:0.1",)))
