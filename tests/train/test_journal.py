"""What a run keeps of its course: lines that outlive a full disk and a kill, seconds that sum to the clock's."""

import json
import os
import time

import pytest

from dsjax.train import journal
from dsjax.train.goodput_summary import WRITTEN
from dsjax.train.journal import Goodput, Incidents, Lines
from dsjax.train.lines import read_lines


def test_lines_wait_while_the_disk_is_full(tmp_path, monkeypatch):
    lines = Lines(tmp_path / "a.jsonl")
    assert lines.add({"n": 0})
    write = os.pwrite

    def full(fd, data, offset):
        return write(fd, data[: len(data) // 2], offset)  # as a disk that fills up within a line

    with monkeypatch.context() as patch:
        patch.setattr(journal.os, "pwrite", full)
        assert not lines.add({"n": 1})
        assert not lines.add({"n": 2})
    assert list(read_lines(tmp_path / "a.jsonl")) == [{"n": 0}]
    assert lines.add({"n": 3})
    assert list(read_lines(tmp_path / "a.jsonl")) == [{"n": n} for n in range(4)]


def test_a_line_cut_short_by_a_kill_is_cut_off(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": 0}\n{"n": 1')
    Lines(path).add({"n": 2})
    assert list(read_lines(path)) == [{"n": 0}, {"n": 2}]


def test_without_write_there_is_no_file(tmp_path):
    Incidents(tmp_path, write=False).add(1, "spike", "text")
    Goodput(tmp_path, write=False).close(1)
    assert not list(tmp_path.iterdir())


def test_spans_sum_to_the_wall_time(tmp_path):
    ledger, begin = Goodput(tmp_path), time.monotonic()
    with ledger.span("checkpoint"):
        time.sleep(0.05)
        with ledger.span("eval"):
            time.sleep(0.1)
    time.sleep(0.1)
    with pytest.raises(KeyError), ledger.span("input"):
        time.sleep(0.02)
        raise KeyError
    seconds = ledger.interval(10)
    assert sum(seconds.values()) == pytest.approx(time.monotonic() - begin, abs=0.02)
    assert seconds["eval"] >= 0.1 and 0.05 <= seconds["checkpoint"] < 0.1 and seconds["step"] >= 0.1
    assert set(seconds) <= set(WRITTEN)


def test_every_start_is_a_session(tmp_path):
    for session in (1, 2):
        ledger = Goodput(tmp_path)
        ledger.start(5, 1.5)
        ledger.close(7)
        rows = [row for row in read_lines(tmp_path / "goodput.jsonl") if row["session"] == session]
        assert [(row["kind"], row["step"]) for row in rows] == [("start", 5), ("end", 7)]
        assert rows[0]["seconds"] == {"restart": 1.5}


def test_incidents_are_lines(tmp_path):
    Incidents(tmp_path).add(3, "spike", "a text")
    Incidents(tmp_path).add(4, "resume", "another")
    rows = [json.loads(line) for line in (tmp_path / "incidents.jsonl").read_text().splitlines()]
    assert [(row["step"], row["kind"], row["text"]) for row in rows] == [
        (3, "spike", "a text"),
        (4, "resume", "another"),
    ]
