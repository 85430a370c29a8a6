"""Every kind of file gives the same documents; what cannot be read is said with file and line, or counted."""

import gzip
import json
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter

from dsjax.config import ConfigError, DataConfig
from dsjax.data.sources import parse_source, read_documents

TEXTS = ["one\n", "zwei ü", "三\n\nthree"]
LINES = [json.dumps({"text": text, "id": i}).encode() for i, text in enumerate(TEXTS)]


def read(*sources, **options):
    skipped = Counter()
    documents = list(read_documents(DataConfig(sources=tuple(str(s) for s in sources), **options), skipped))
    return documents, dict(skipped)


def texts(*sources, **options) -> list[str]:
    return [document.text for document in read(*sources, **options)[0]]


def write_array_record(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def write_parquet(path, values, name="text"):
    pyarrow.parquet.write_table(pyarrow.table({name: values}), path, row_group_size=2)


WRITERS = {
    "a.jsonl": lambda path: path.write_bytes(b"\n".join(LINES)),
    "a.ndjson": lambda path: path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(LINES) + b"\r\n"),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(b"\n".join(LINES))),
    "a.jsonl.zst": lambda path: path.write_bytes(b"".join(zstandard.compress(line + b"\n") for line in LINES)),
    "a.parquet": lambda path: write_parquet(path, TEXTS),
    "a.array_record": lambda path: write_array_record(path, LINES),
    "a.arrayrecord": lambda path: write_array_record(path, [text.encode() for text in TEXTS]),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_records_gives_the_same_documents(name, tmp_path):
    WRITERS[name](tmp_path / name)
    documents, skipped = read(tmp_path / name)
    assert [d.text for d in documents] == TEXTS and not skipped
    assert len({d.key for d in documents}) == 3 and documents[1].name.startswith(f"{name} ")


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a", "a.txt.gz", "a.txt.zst"])
def test_a_text_file_is_one_document(name, tmp_path):
    data = "\n\n".join(TEXTS).encode()
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get((tmp_path / name).suffix, bytes)
    (tmp_path / name).write_bytes(pack(data))
    assert texts(tmp_path / name) == [data.decode()]


def test_another_text_field_is_read_by_option(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    write_parquet(tmp_path / "a.parquet", ["y"], "body")
    assert texts(tmp_path / "a.jsonl", tmp_path / "a.parquet", text_field="body") == ["x", "y"]


def test_a_folder_is_read_in_order_without_hidden_and_unknown_files(tmp_path):
    for name in ("b.txt", "a/z.md", "a/.hidden/x.txt", "c.png", ".d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    documents, skipped = read(tmp_path)
    assert [d.text for d in documents] == ["a/z.md", "b.txt"] == [d.name for d in documents]
    assert skipped == {"unknown suffix": 1}


def test_a_glob_names_files_from_its_first_wildcard_on(tmp_path):
    for name in ("a/index.md", "b/index.md", "b/other.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [d.key for d in read(tmp_path / "**" / "*.md")[0]] == ["a/index.md", "b/index.md"]


def test_weights_come_after_a_colon(tmp_path):
    (tmp_path / "a:2").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    documents, _ = read(f"{tmp_path}/b.txt:0.5", f"{tmp_path}/a:2", f"{tmp_path}/a:2:3")
    assert [(d.text, d.weight) for d in documents] == [("b", 0.5), ("a", 1.0), ("a", 3.0)]
    assert parse_source("stdlib:2") == ("stdlib", 2.0)
    for weight in ("0", "-1", "nan", "inf"):
        with pytest.raises(ConfigError, match=f"expected a positive weight after the colon, got {weight}"):
            parse_source(f"b.txt:{weight}")


def test_stdlib_is_the_running_librarys_sources_and_help_topics():
    documents, skipped = read("stdlib")
    names = [d.name for d in documents]
    assert 500 < len(documents) < 900 and 10e6 < sum(len(d.text.encode()) for d in documents) < 13e6
    assert "argparse.py" in names and "json/decoder.py" in names and "pydoc_data/topics/if" in names
    assert "pydoc_data/topics.py" not in names and len(set(names)) == len(names)
    assert not any(part in ("test", "tests", "idlelib") for name in names for part in name.split("/")[:-1])
    assert set(skipped) <= {"empty"}


CUT = gzip.compress(b"\n".join(LINES * 1000))[:-20]
BAD = {  # file, its bytes, the message, the reason counted
    "a line that is not JSON": ("a.jsonl", LINES[0] + b"\n{oops\n", "a.jsonl line 2: not JSON", "bad JSON"),
    "a line of deep JSON": ("a.jsonl", b"[" * 100_000, "a.jsonl line 1: not JSON", "bad JSON"),
    "a line that is a list": ("a.jsonl", b"[1]", "line 1: expected a JSON object, got list", "bad JSON"),
    "a missing field": ("a.jsonl", b'{"body": 1}', r"line 1: no field 'text' .*fields: body", "no text field"),
    "a field that is a number": ("a.jsonl", b'{"text": 1}', "line 1: field 'text': expected a string", "no text field"),
    "half a surrogate pair": ("a.jsonl", b'{"text": "\\ud800"}', "line 1: .* half a surrogate", "wrong encoding"),
    "a line in Latin-1": ("a.jsonl", b'\n{"text": "\xe9"}', "line 2: byte 0xe9 is not UTF-8", "wrong encoding"),
    "a file in Latin-1": ("a.txt", b"one\ntwo\ncaf\xe9", "a.txt line 3: byte 0xe9 is not UTF-8", "wrong encoding"),
    "no gzip": ("a.jsonl.gz", b"hello", "a.jsonl.gz: damaged or cut off", "damaged file"),
    "a cut gzip": ("a.jsonl.gz", CUT, "a.jsonl.gz: damaged or cut off", "damaged file"),
    "a damaged gzip": ("a.txt.gz", CUT[:40] + b"x" * 40, "a.txt.gz: damaged or cut off", "damaged file"),
    "a cut zstd": ("a.txt.zst", zstandard.compress(bytes(range(100)))[:-9], "damaged or cut off", "damaged file"),
    "no parquet": ("a.parquet", b"hello", "a.parquet: not a whole Parquet file", "damaged file"),
    "no ArrayRecord": ("a.array_record", b"hello", "a.array_record: not a whole ArrayRecord", "damaged file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_an_error_with_file_and_line_or_a_counted_skip(case, tmp_path):
    name, data, message, reason = BAD[case]
    (tmp_path / name).write_bytes(data)
    (tmp_path / "good.txt").write_text("good")
    with pytest.raises(ConfigError, match=rf"{message}.*--data.on-error=skip") as error:
        read(tmp_path / name, tmp_path / "good.txt")
    assert "\n" not in str(error.value)
    documents, skipped = read(tmp_path / name, tmp_path / "good.txt", on_error="skip")
    assert documents[-1].text == "good" and skipped[reason] == 1


def test_a_skipped_record_does_not_end_its_file(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([LINES[0], b"{", b'{"text": "\xff"}', LINES[1]]))
    write_parquet(tmp_path / "a.parquet", pyarrow.array([b"x", b"\xff", None, b"y"]))
    write_array_record(tmp_path / "a.array_record", [b"x", b"\xff", b"{", b"y"])
    files = [tmp_path / name for name in ("a.jsonl", "a.parquet", "a.array_record")]
    documents, skipped = read(*files, on_error="skip")
    assert [d.text for d in documents] == [*TEXTS[:2], "x", "y", "x", "y"]
    assert skipped == {"bad JSON": 2, "wrong encoding": 3, "no text field": 1}


def test_a_parquet_column_is_named_when_it_is_not_there_or_no_text(tmp_path):
    write_parquet(tmp_path / "a.parquet", [1, 2])
    with pytest.raises(ConfigError, match="column 'text': expected strings, got int64"):
        read(tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"no column 'body' \(data.text_field\); its columns: text"):
        read(tmp_path / "a.parquet", text_field="body")


def test_a_source_that_is_not_there_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r"data.sources=none.txt: no such file or folder; expected stdlib, a file"):
        read("none.txt")
    with pytest.raises(ConfigError, match=r"data.sources=.*\*.txt: no file matches this pattern"):
        read(tmp_path / "*.txt")
    with pytest.raises(ConfigError, match=r"no text, .jsonl, .parquet or .array_record file in this folder"):
        read(tmp_path)
