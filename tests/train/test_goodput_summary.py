"""Where the time went: every second of the wall clock has one category, and steps done twice count once."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.train.goodput_summary import CATEGORIES, COUNTED, WRITTEN, even, goodput, read, summary, summed, timeline


def row(kind, session, time, done, /, **seconds):
    return {"kind": kind, "session": session, "time": time, "step": done, "seconds": seconds}


TWICE = [  # killed after step 30, whose last checkpoint was 20; back after 50 s
    row("start", 1, 1010.0, 0, restart=10.0),
    row("interval", 1, 1050.0, 10, compile=20.0, step=20.0),
    row("interval", 1, 1080.0, 30, step=24.0, input=6.0),
    row("start", 2, 1142.0, 20, restart=12.0),
    row("interval", 2, 1162.0, 40, step=16.0, eval=3.0),
    row("end", 2, 1165.0, 40, checkpoint=3.0),
]


def nonzero(seconds):
    return {name: value for name, value in seconds.items() if value > 1e-9}


def test_a_run_that_was_killed_and_came_back():
    assert nonzero(summary(TWICE)) == pytest.approx(
        {
            "restart": 22.0,
            "compile": 20.0,
            "step": 20.0 + 12.0 + 16.0,
            "lost": 12.0,  # steps 21 to 30 are half of the interval's
            "input": 6.0,
            "idle": 50.0,
            "eval": 3.0,
            "checkpoint": 3.0,
            "other": 1.0,  # the interval of 20 s that tells of 19
        }
    )
    assert goodput(summary(TWICE)) == pytest.approx(48 / 165)
    assert tuple(summary([])) == CATEGORIES
    assert goodput(summary([])) is None


def test_a_rollback_within_a_session_loses_steps_too():
    rows = [
        row("start", 1, 0.0, 0),
        row("interval", 1, 10.0, 10, step=10.0),
        row("interval", 1, 14.0, 5, rollback=4.0),
        row("interval", 1, 24.0, 15, step=10.0),
    ]
    assert nonzero(summary(rows)) == pytest.approx({"step": 15.0, "lost": 5.0, "rollback": 4.0})


def test_a_session_that_did_not_get_further_than_the_one_before():
    rows = [*TWICE[:3], row("start", 2, 1100.0, 0, restart=5.0)]
    assert summary(rows)["step"] == pytest.approx(0)
    assert summary(rows)["lost"] == pytest.approx(44)


def test_the_timeline_has_no_gaps_and_names_its_steps():
    spans = timeline(TWICE)
    assert [a.end for a in spans[:-1]] == [b.begin for b in spans[1:]]
    assert (spans[0].begin, spans[-1].end) == (1000, 1165)
    assert [(s.session, s.first, s.last) for s in spans] == [
        (1, 0, 0),
        (1, 0, 10),
        (1, 10, 30),
        (1, 30, 30),  # idle
        (2, 20, 20),
        (2, 20, 40),
        (2, 40, 40),
    ]


def test_what_a_kill_left_is_passed_over(tmp_path):
    damaged = [
        "",
        "[]",
        "7",
        '{"kind": "interval"}',
        '{"kind": "end", "session": 1, "time": null, "step": 3, "seconds": {}}',
    ]
    lines = [json.dumps(line) for line in TWICE]
    (tmp_path / "goodput.jsonl").write_text("\n".join([*damaged, *lines, lines[-1][:30]]))
    assert summary(read(tmp_path)) == summary(TWICE)
    assert read(tmp_path / "nowhere") == []


@st.composite
def runs(draw):
    """Rows as a run writes them, of up to four sessions; and the wall time."""
    seconds = st.floats(0, 1e4)
    rows, time, step = [], draw(st.floats(0, 2e9)), 0
    begin = time
    for session in range(1, draw(st.integers(1, 4)) + 1):
        step = draw(st.integers(0, step))
        restart = draw(seconds)
        time += restart + (draw(seconds) if session > 1 else 0)
        rows.append(row("start", session, time, step, restart=restart))
        for kind in draw(st.lists(st.sampled_from(["interval", "end"]), max_size=4)):
            parts = draw(st.dictionaries(st.sampled_from([*WRITTEN, "new"]), seconds, max_size=4))
            time += sum(parts.values())
            step += draw(st.integers(0, 50))
            rows.append(row(kind, session, time, step, **parts))
    return rows, time - begin


@settings(max_examples=60, deadline=None)
@given(runs())
def test_the_categories_sum_to_the_wall_time(run):
    rows, wall = run
    found = summary(rows)
    assert min(found.values()) >= -1e-6
    assert sum(found.values()) == pytest.approx(wall, rel=1e-6, abs=1e-5)
    worked = sum(row["seconds"].get(name, 0.0) for row in rows for name in COUNTED)
    assert sum(found[name] for name in COUNTED) + found["lost"] == pytest.approx(worked, rel=1e-5, abs=1e-3)
    if all(row["session"] == 1 for row in rows):
        assert found["lost"] == found["idle"] == 0


@settings(max_examples=60, deadline=None)
@given(runs(), st.integers(1, 30))
def test_equal_columns_hold_the_same_seconds(run, n):
    spans = timeline(run[0])
    columns = even(spans, n)
    assert len(columns) <= n
    for name, value in summed(columns).items():
        assert value == pytest.approx(summed(spans)[name], rel=1e-6, abs=1e-3)
    for column in columns:
        assert sum(column.seconds.values()) == pytest.approx(column.end - column.begin, rel=1e-3, abs=1e-3)


numbers = st.floats() | st.integers() | st.sampled_from([None, "x", True, [], 10**400])
wild = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["start", "interval", "end", None]),
        "session": st.integers(1, 3) | numbers,
        "time": st.floats(0, 1e6) | numbers,
        "step": st.integers(0, 100) | numbers,
        "seconds": st.dictionaries(st.sampled_from(CATEGORIES), st.floats(0, 1e6) | numbers) | numbers,
    }
)


@settings(max_examples=60, deadline=None)
@given(st.lists(wild, max_size=8))
def test_a_clock_set_back_and_rows_that_make_no_sense(rows):
    spans, found = timeline(rows), summary(rows)
    assert all(math.isfinite(value) and value >= 0 for value in found.values())
    wall = spans[-1].end - spans[0].begin if spans else 0
    assert sum(found.values()) == pytest.approx(wall, rel=1e-6, abs=1e-6)
