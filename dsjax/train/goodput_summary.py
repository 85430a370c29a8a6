"""Where the wall time of a run went, from the rows of its goodput.jsonl.

A row tells of the time since the row before it: {"kind": "start" | "interval" | "end", "session": n, "time": when it
ended, unix seconds, "step": steps done, "seconds": {category: seconds}}. A session is one start of the process. What
rows do not say is found by comparing them: `lost` are seconds of steps that were done again, `idle` the time between
two sessions, `other` what a row leaves unsaid of its time.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dsjax.train.lines import number, read_lines

WRITTEN = ("step", "sample", "compile", "input", "checkpoint", "eval", "check", "rollback", "restart")
DERIVED = ("lost", "idle", "other")
CATEGORIES = (*WRITTEN, *DERIVED)
COUNTED = ("step", "sample")  # what a run is for; done again, it was lost


@dataclasses.dataclass(frozen=True)
class Span:
    """A stretch of wall time; `seconds` sum to its length. Steps first + 1 .. last were taken in it."""

    begin: float  # unix seconds
    end: float
    session: int
    first: int
    last: int
    seconds: dict[str, float]


def summary(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Seconds of every category; they sum to the wall time from the first session's begin to the last row."""
    return summed(timeline(rows))


def summed(spans: Iterable[Span]) -> dict[str, float]:
    """Seconds of every category in a timeline."""
    total = dict.fromkeys(CATEGORIES, 0.0)
    for span in spans:
        for name, seconds in span.seconds.items():
            total[name] = total.get(name, 0.0) + seconds
    return total


def goodput(seconds: dict[str, float]) -> float | None:
    """The part of the wall time that went into steps that count, and into sampling for them; None if none has passed."""
    total = sum(seconds.values())
    return sum(seconds[name] for name in COUNTED) / total if total > 0 else None


def timeline(rows: Iterable[dict[str, Any]]) -> list[Span]:
    """The run's wall time without gaps, a span for every row and one for every pause between sessions.

    A clock set back between two rows is taken as standing still, and a row that claims more seconds than have passed
    as having them in the same proportions. Rows that are no rows are passed over.
    """
    spans: list[Span] = []
    for row in filter(_whole, rows):
        seconds = {k: float(v) for k, v in row["seconds"].items() if k not in DERIVED and 0 < (number(v) or 0) < 1e12}
        worked, time, step, session = sum(seconds.values()), float(row["time"]), int(row["step"]), int(row["session"])
        before = spans[-1] if spans else None
        if before is None:
            begin, first = time - worked, step if row["kind"] == "start" else 0
        elif before.session == session and row["kind"] != "start":
            begin, first = before.end, before.last
        else:
            begin, first = max(before.end, time - worked), step if row["kind"] == "start" else before.last
            if begin > before.end:
                spans.append(Span(before.end, begin, before.session, before.last, before.last, {"idle": 0.0}))
        end = max(begin, time)
        spans.append(Span(begin, end, session, min(first, step), step, seconds))
    return _without_lost([_filled(span) for span in spans])


def read(run_folder: Path) -> list[dict[str, Any]]:
    """The rows of a run; none if it kept none."""
    return list(read_lines(run_folder / "goodput.jsonl"))


def even(spans: list[Span], n: int) -> list[Span]:
    """The same time in n spans of equal length; every span's seconds are spread evenly over it."""
    if not spans or spans[-1].end <= spans[0].begin:
        return []
    origin, width = spans[0].begin, (spans[-1].end - spans[0].begin) / n
    parts: list[dict[str, float]] = [{} for _ in range(n)]
    members: list[list[Span]] = [[] for _ in range(n)]
    for span in spans:
        if span.end <= span.begin:
            continue
        start, stop = (span.begin - origin) / width, (span.end - origin) / width
        for k in range(min(n - 1, int(start)), min(n, int(stop) + 1)):
            share = (min(stop, k + 1) - max(start, k)) / (stop - start)
            if share > 0:
                members[k].append(span)
                for name, seconds in span.seconds.items():
                    parts[k][name] = parts[k].get(name, 0.0) + share * seconds
    return [
        Span(
            origin + k * width,
            origin + (k + 1) * width,
            members[k][-1].session,
            members[k][0].first,
            members[k][-1].last,
            parts[k],
        )
        for k in range(n)
        if members[k]
    ]


def _whole(row: dict[str, Any]) -> bool:
    return (
        all(number(row.get(name)) is not None for name in ("session", "time", "step"))
        and isinstance(row.get("seconds"), dict)
        and isinstance(row.get("kind"), str)
    )


def _filled(span: Span) -> Span:
    """The span with seconds that sum to its length."""
    length, worked = span.end - span.begin, sum(span.seconds.values())
    if "idle" in span.seconds:
        return dataclasses.replace(span, seconds={"idle": length})
    if worked > length:
        return dataclasses.replace(span, seconds={k: v * (length / worked) for k, v in span.seconds.items()})
    return dataclasses.replace(span, seconds={**span.seconds, "other": length - worked})


def _without_lost(spans: list[Span]) -> list[Span]:
    """Seconds of steps, and of sampling for them, that a later span took again become `lost`, in proportion to the steps."""
    kept, again = [], float("inf")  # the step from which later spans took steps again
    for span in reversed(spans):
        steps, redone = span.last - span.first, span.last - max(span.first, again)
        part = max(0.0, redone / steps) if steps else float(again < span.last)
        if part and (counted := {name: span.seconds[name] for name in COUNTED if name in span.seconds}):
            left = {name: (1 - part) * value for name, value in counted.items()}
            lost = sum(counted.values()) - sum(left.values())
            span = dataclasses.replace(span, seconds={**span.seconds, **left, "lost": lost})
        kept.append(span)
        again = min(again, span.first)
    return kept[::-1]
