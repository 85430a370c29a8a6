"""report.html: one page of a run that needs no network, from what the run folder holds. No JAX is needed to make it.

The tables are HTML. The curves are drawn by page.js from the numbers in the page; a policy in the page's head keeps it
from loading anything and from running any script but that one.
"""

import base64
import datetime
import hashlib
import time
from pathlib import Path
from typing import Any

import jinja2

from dsjax import config as configuration
from dsjax.config import Config, ConfigError, field_rows, show
from dsjax.files import replacing
from dsjax.plan.count import human
from dsjax.train import goodput_summary
from dsjax.train.curves import charts
from dsjax.train.digest import Digest
from dsjax.train.goodput_summary import Span
from dsjax.train.lines import number, read_lines

HERE = Path(__file__).parent
SPANS = 240  # of the timeline
INCIDENTS, EVALUATIONS, TEXT = 500, 100, 400  # rows of tables; characters of a text in them
SAMPLES = 20_000  # characters of the last samples
SPEEDS = 20  # rows whose median is the speed now
MEANING = {
    "step": "training steps that count",
    "sample": "sampling answers to learn from, and judging them",
    "compile": "compiling the step",
    "input": "waiting for data",
    "checkpoint": "waiting for checkpoints",
    "eval": "held-out evaluations",
    "check": "checks of the state",
    "rollback": "going back to a checkpoint",
    "restart": "from a process's start to its first step",
    "lost": "steps that were done again",
    "idle": "between two sessions, by their rows",
    "other": "not accounted for",
}


def write(run_folder: Path, path: Path, preset: Config | None = None, version: str = "") -> int:
    """Writes the page, whole or not at all; returns its bytes. `preset` is what the configuration is compared with."""
    data = page(run_folder, preset, version).encode()
    with replacing(path) as file:
        file.write(data)
    return len(data)


def page(run_folder: Path, preset: Config | None = None, version: str = "") -> str:
    """The page as HTML, with the `version` of dsjax that made it."""
    config, broken = _config(run_folder)
    digest = Digest(read_lines(run_folder / "metrics.jsonl"))
    spans = goodput_summary.timeline(goodput_summary.read(run_folder))
    seconds = goodput_summary.summed(spans)
    incidents = _incidents(run_folder)
    n_incidents, incidents = len(incidents), incidents[-INCIDENTS:]
    script, style = ((HERE / f"page.{kind}").read_text(encoding="utf-8") for kind in ("js", "css"))
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"clock": clock, "when": when, "fixed": fixed, "size": size}
    return environment.from_string((HERE / "page.html").read_text(encoding="utf-8")).render(
        name=run_folder.absolute().name,
        title=_cut(digest.run.get("title", "")),
        version=version,
        now=time.time(),
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data={
            "charts": charts(digest, config),
            "steps": digest.steps,
            "layers": digest.layers,
            "violation": digest.violation(),
            "loads": digest.loads.packed(),
            "marks": [[row["step"], row["kind"], row["text"]] for row in incidents if row["step"] is not None],
            "spans": _spans(spans),
        },
        last=_last_time(digest),
        finished=config is not None and digest.step >= config.steps,
        tiles=_tiles(digest, config, seconds, n_incidents),
        rows_per_point=digest.bins[0].stop if digest.bins else 1,
        rows=len(digest.train),
        held=digest.held[-EVALUATIONS:][::-1],
        held_rows=len(digest.held),
        averaged=any("ema_heldout_nats" in row for row in digest.held),
        in_bits=any("heldout_bpb" in row for row in digest.held),
        columns=_columns(digest),
        samples=_samples(run_folder),
        experts=digest.loads.shape,
        seconds=[(name, MEANING.get(name, ""), value) for name, value in seconds.items() if value >= 0.05],
        total=sum(seconds.values()),
        goodput=goodput_summary.goodput(seconds),
        sessions=len({span.session for span in spans}),
        evened=len(spans) > SPANS,
        began=spans[0].begin if spans else None,
        incidents=incidents[::-1],
        n_incidents=n_incidents,
        sections=_sections(config, preset) if config else {},
        broken=broken,
        preset=preset.name if preset else None,
        machine=_machine(digest.run),
        facts=_facts(digest.run.get("facts")),
        checkpoints=_checkpoints(run_folder),
    )


def clock(seconds: float) -> str:
    """2 d 03:04:05, 3:04:05 or 4:05."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h:02}:{m:02}:{s:02}"
    return f"{h}:{m:02}:{s:02}" if h else f"{m}:{s:02}"


def when(unix: float | None) -> str:
    """2026-11-22 19:15:00, in UTC."""
    try:
        return datetime.datetime.fromtimestamp(unix, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (TypeError, ValueError, OverflowError, OSError):
        return "–"


def fixed(value: Any, digits: int = 4) -> str:
    return "NaN" if number(value) is None else f"{value:.{digits}f}"


def size(n: int) -> str:
    """1.2 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


def _config(run_folder: Path) -> tuple[Config | None, str]:
    """The configuration, or why there is none to show."""
    try:
        return configuration.load(run_folder / "config.json"), ""
    except ConfigError as error:
        return None, str(error)


def _incidents(run_folder: Path) -> list[dict[str, Any]]:
    return [
        {
            "time": number(row.get("time")),
            "step": None if (step := number(row.get("step"))) is None else int(step),
            "kind": _cut(row.get("kind", "")),
            "text": _cut(row.get("text", "")),
        }
        for row in read_lines(run_folder / "incidents.jsonl")
    ]


def _columns(digest: Digest) -> list[tuple[str, str]]:
    """(key, heading) of an evaluation's columns, where it is of answers to problems; else none."""
    if digest.rewards() is None:
        return []
    passed = [(name, f"pass@{name[5:]}") for name in digest.passes()]
    rest = {"heldout_reward": "reward", "heldout_length": "tokens", "heldout_truncated": "cut off"}
    return [*passed, *rest.items()]


def _samples(run_folder: Path) -> tuple[str, str] | None:
    """Name and text of the newest file of samples."""
    files = sorted((run_folder / "samples").glob("step-*.txt"))
    try:
        text = files[-1].read_text(encoding="utf-8", errors="replace")
    except (IndexError, OSError):
        return None
    more = f"\n... ({len(text):,} characters)" if len(text) > SAMPLES else ""
    return files[-1].name, text[:SAMPLES] + more


def _tiles(digest: Digest, config: Config | None, seconds: dict[str, float], incidents: int) -> list[tuple]:
    """(label, value, what it means) of the numbers at the top."""
    train, held = digest.train[-1] if digest.train else {}, digest.held[-1] if digest.held else {}
    tiles = [("step", f"{digest.step:,}", f"of {config.steps:,}" if config else "")]
    if (tokens := number(train.get("tokens"))) is not None:
        tiles.append(("tokens", human(int(tokens)), "seen in training"))
    if digest.rewards() is not None:
        tiles += _policy_tiles(train, held)
    elif train:
        tiles.append(("training loss", fixed(train.get("loss")), "nats a token, last row"))
    if held and digest.rewards() is None:
        rivals = [f"{name} {held[f'{name}_bpb']:.3f}" for name in ("gzip", "xz") if number(held.get(f"{name}_bpb"))]
        if "heldout_bpb" in held:
            tiles.append(("held out", fixed(held["heldout_bpb"], 3), f"bits a byte; {', '.join(rivals)}"))
        else:
            tiles.append(("held out", fixed(held.get("heldout_nats")), "nats a learned token"))
    if speeds := sorted(v for row in digest.train[-SPEEDS:] if (v := number(row.get("tokens_per_s"))) is not None):
        tiles.append(
            (
                "tokens a second",
                human(int(speeds[len(speeds) // 2])),
                f"median of the last {len(speeds)} rows" if speeds[1:] else "last row",
            )
        )
    if digest.layers and number(train.get("max_vio_mean")) is not None:
        tiles.append(("MaxVio", fixed(train["max_vio_mean"], 2), f"mean of {len(digest.layers)} layers, last row"))
    if (part := goodput_summary.goodput(seconds)) is not None:
        tiles.append(("goodput", f"{100 * part:.1f}%", f"of {clock(sum(seconds.values()))} of wall time"))
    skipped = int(number(train.get("skipped")) or 0)
    tiles.append(("incidents", f"{incidents:,}", f"and {skipped:,} skipped steps" if skipped else ""))
    return tiles


def _policy_tiles(train: dict[str, Any], held: dict[str, Any]) -> list[tuple]:
    tiles = []
    if train:
        tiles.append(("reward", fixed(train.get("reward"), 3), "mean of the last row's answers"))
    if "pass_1" in held:
        most = max((int(name[5:]) for name in held if name.startswith("pass_") and name[5:].isdecimal()), default=1)
        more = f", pass@{most} {fixed(held[f'pass_{most}'], 3)}" if most > 1 else ""
        tiles.append(("pass@1", fixed(held["pass_1"], 3), f"of held-out problems{more}"))
    elif held:
        tiles.append(("held out", fixed(held.get("heldout_reward"), 3), "reward"))
    if train:
        tiles.append(("length", fixed(train.get("length"), 1), "tokens of an answer, last row"))
        gap = number(train.get("gap"))
        tiles.append(("gap", "–" if gap is None else f"{gap:.1e}", "nats between sampler and trainer, last row"))
    return tiles


def _spans(spans: list[Span]) -> list[list]:
    """[begin, end, session, first step, last step, {category: seconds}], in seconds since the beginning."""
    shown = goodput_summary.even(spans, SPANS) if len(spans) > SPANS else spans
    return [
        [
            round(span.begin - spans[0].begin, 2),
            round(span.end - spans[0].begin, 2),
            span.session,
            span.first,
            span.last,
            {name: round(value, 3) for name, value in span.seconds.items() if value >= 0.001},
        ]
        for span in shown
    ]


def _sections(config: Config, preset: Config | None) -> dict[str, list[tuple]]:
    """Section -> (field, value, the preset's value where it is another, what it means) of every field."""
    usual = {name: value for name, value, _ in field_rows(preset)} if preset else {}
    sections: dict[str, list[tuple]] = {}
    for name, value, text in field_rows(config):
        section, _, field = name.rpartition(".")
        if section == "distributed":  # of one launch, and not kept with the run
            continue
        other = show(usual[name]) if name in usual and usual[name] != value else None
        if preset and name not in usual:
            other = "none"
        sections.setdefault(section, []).append((field, show(value), other, text))
    return sections


def _machine(run: dict[str, Any]) -> list[tuple[str, str]]:
    shown = ("kind", "step", "title", "layers", "facts")
    rows = [(name, _cut(value)) for name, value in run.items() if name not in shown and name != "time"]
    return [("began", f"{when(number(run.get('time')))} UTC"), *rows] if run else []


def _facts(facts: Any) -> list[tuple[str, str]]:
    """What the run read, by whatever names the facts have."""
    rows = []
    for name, value in facts.items() if isinstance(facts, dict) else ():
        if isinstance(value, dict):
            value = ", ".join(f"{_amount(v)} {k}" for k, v in value.items()) or "none"
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        rows.append((name.replace("_", " "), _cut(value if isinstance(value, str) else _amount(value))))
    return rows


def _amount(value: Any) -> str:
    if number(value) is None:
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _checkpoints(run_folder: Path) -> list[tuple[str, int, float | None]]:
    """(name, bytes, when it was written) of each, the newest step first."""
    try:
        folders = [path for path in (run_folder / "checkpoints").iterdir() if path.is_dir()]
    except OSError:
        return []
    folders.sort(key=lambda path: (path.name.isdecimal(), int(path.name) if path.name.isdecimal() else 0), reverse=True)
    return [(path.name, sum(_stat(file)[0] for file in path.rglob("*")), _stat(path)[1]) for path in folders]


def _stat(path: Path) -> tuple[int, float | None]:
    """Bytes, if it is a file, and time; the run may remove it meanwhile."""
    try:
        found = path.lstat()
    except OSError:
        return 0, None
    return 0 if path.is_dir() else found.st_size, found.st_mtime


def _last_time(digest: Digest) -> float | None:
    times = [number(row.get("time")) for row in (*digest.train[-1:], *digest.held[-1:], digest.run)]
    return max((t for t in times if t is not None), default=None)


def _cut(value: Any) -> str:
    text = str(value)
    return text if len(text) <= TEXT else f"{text[:TEXT]} ... ({len(text):,} characters)"
