"""A pipeline of post-training as data: a .toml file with a [[stage]] a stage, read and checked before anything runs.

    base = "runs/v3-128k"

    [[stage]]
    name = "cold_start"
    kind = "sft"
    data = ["cold_start.jsonl"]

    [[stage]]
    name = "reasoning_rl"
    kind = "grpo"
    from = "cold_start"
    task = "reasoning.jsonl"
    config.optimizer.peak_lr = 1e-6

`r1.toml` beside this file is DeepSeek-R1's, with every key that there is.
"""

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dsjax.config import ConfigError, field_names, nearest, show
from dsjax.data.sources import parse_source

BASE = "base"  # what a stage may go on from besides the stages before it
EXAMPLE = Path(__file__).with_name("r1.toml")
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")


class Key(NamedTuple):
    """What a key takes, in words and as a test; and what it is if it is not given."""

    expected: str
    valid: Callable[[Any], bool]
    default: Any = None
    needed: bool = False


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(default: Any = None, needed: bool = False) -> Key:
    return Key("a text", _is_text, default, needed)


def _one_of(*names: str, needed: bool = False, default: Any = None) -> Key:
    return Key(f"{', '.join(names[:-1])} or {names[-1]}", lambda value: value in names, default, needed)


def _whole(least: int, default: Any = None, needed: bool = False) -> Key:
    words = f"a whole number at least {least}"
    return Key(words, lambda v: _is_number(v) and isinstance(v, int) and least <= v < 2**32, default, needed)


def _number(words: str, valid: Callable[[float], bool], default: Any = None) -> Key:
    return Key(words, lambda value: _is_number(value) and valid(value), default)


_TEXTS = "a list of one or more texts"
_NAMED = Key("a name of a-z, 0-9, _ and -", lambda v: isinstance(v, str) and bool(_NAME.fullmatch(v)), needed=True)
_TABLE = Key('fields by dotted name, as in config.optimizer.peak_lr = "1e-5"', lambda v: isinstance(v, dict), {})
_ASKING = {
    "task": _text(needed=True),
    "rewards": _text(),
    "samples": _whole(1, 4),
    "temperature": _number("a number at least 0", lambda v: 0 <= v <= 100),
    "top_p": _number("a number greater than 0 and at most 1", lambda v: 0 < v <= 1),
    "max_tokens": _whole(1, 32_768),
    "max_rows": _whole(1, 64),
    "style": _one_of("r1_zero", "chat", "plain", default="chat"),
    "seed": _whole(0, 0),
}
_STAGE = {"name": _NAMED, "kind": _one_of("sft", "grpo", "traces", needed=True), "from": _text(BASE)}
KINDS: dict[str, dict[str, Key]] = {
    "sft": _STAGE
    | {
        "data": Key(_TEXTS, lambda v: isinstance(v, list) and bool(v) and all(map(_is_text, v)), needed=True),
        "recipe": _text("r1"),
        "epochs": _number("a number greater than 0", lambda v: 0 < v < 1e6),
        "template": _text(),
        "last_turn": Key("true or false", lambda v: isinstance(v, bool), False),
        "config": _TABLE,
    },
    "grpo": _STAGE | {"task": _text(needed=True), "rewards": _text(), "recipe": _text("r1_1"), "config": _TABLE},
    "traces": _STAGE
    | _ASKING
    | {
        "problems": _whole(1, needed=True),
        "temperature": _ASKING["temperature"]._replace(default=1.0),
        "top_p": _ASKING["top_p"]._replace(default=1.0),
        "keep": _one_of("right", "all", default="right"),
        "most": _whole(1),
        "longest": _whole(1),
        "language": _number("a number from 0 to 1", lambda v: 0 <= v <= 1, 0.0),
    },
}
MEASURE = (
    {"name": _NAMED}
    | _ASKING
    | {
        "problems": _whole(1),
        "heldout": _text(),
        "temperature": _ASKING["temperature"]._replace(default=0.6),
        "top_p": _ASKING["top_p"]._replace(default=0.95),
    }
)
_TOP = ("base", "stage", "measure")


@dataclass(frozen=True)
class Stage:
    """One of a pipeline. `given` has all keys of its kind, those not given with their defaults."""

    number: int  # from 1
    given: Mapping[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.given[key]

    @property
    def name(self) -> str:
        return self.given["name"]

    @property
    def kind(self) -> str:
        return self.given["kind"]

    @property
    def source(self) -> str:
        return self.given["from"]

    @property
    def folder(self) -> str:
        return f"{self.number}-{self.name}"

    @property
    def changes(self) -> dict[str, Any]:
        """Configuration fields by dotted name."""
        return self.given["config"]


@dataclass(frozen=True)
class Recipe:
    """A pipeline: what it begins with, its stages in order, and what each one's model is asked."""

    where: str  # the file, for messages
    text: str
    base: str
    stages: tuple[Stage, ...]
    measures: tuple[Mapping[str, Any], ...]

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    def error(self, stage: Stage, problem: object) -> ConfigError:
        return ConfigError(f"{self.where}: stage {stage.number} ({stage.name}): {problem}")


def read(path: Path | str) -> Recipe:
    """The recipe of a file. Raises ConfigError: the file, the stage, the key, its value, and what was expected."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from None
    return parse(text, str(path))


def parse(text: str, where: str) -> Recipe:
    """The recipe of a file's text."""
    try:
        whole = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where}: not TOML: {show(str(error), quote=False)}") from None
    for key in whole:
        if key not in _TOP:
            raise ConfigError(f"{where}: {show(key)}: no such key; the nearest is {nearest(key, _TOP)[0]}")
    if not _is_text(whole.get("base")):
        raise ConfigError(f"{where}: base={show(whole.get('base'))}: expected a run folder or a Hub folder")
    given, asked = _tables(whole, "stage", where), _tables(whole, "measure", where)
    if not given:
        raise ConfigError(f"{where}: stage: missing; expected one or more [[stage]]")
    stages: list[Stage] = []
    for number, table in enumerate(given, 1):
        name = table.get("name")
        here = f"{where}: stage {number}" + (f" ({show(name)})" if isinstance(name, str) else "")
        stages.append(_stage(table, number, stages, here))
    measures: list[Mapping[str, Any]] = []
    for number, table in enumerate(asked, 1):
        here = f"{where}: measure {number}"
        measures.append(_checked(table, MEASURE, here))
        if measures[-1]["name"] in [other["name"] for other in measures[:-1]]:
            raise ConfigError(f"{here}: name={measures[-1]['name']}: expected another name than those before it")
    return Recipe(where, text, whole["base"], tuple(stages), tuple(measures))


def _tables(whole: dict[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    tables = whole.get(key, [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(f"{where}: {key}={show(tables)}: expected tables, each under [[{key}]]")
    return tables


def _stage(table: dict[str, Any], number: int, before: list[Stage], where: str) -> Stage:
    kind = table.get("kind")
    if kind not in KINDS:
        said = "missing" if kind is None else f"={show(kind)}"
        raise ConfigError(f"{where}: kind{': ' if kind is None else ''}{said}; expected sft, grpo or traces")
    given = _checked(table, KINDS[kind], where)
    known = [stage.name for stage in before]
    if given["name"] in (*known, BASE):
        raise ConfigError(f"{where}: name={given['name']}: expected another name than {BASE} and those before it")
    models = [BASE, *(stage.name for stage in before if stage.kind != "traces")]
    if given["from"] not in models:
        raise ConfigError(
            f"{where}: from={show(given['from'])}: expected {BASE} or a stage before it that makes a model; the "
            f"nearest is {nearest(given['from'], models)[0]}"
        )
    if "config" in given:
        given["config"] = _flat(given["config"], where)
    for entry in given.get("data", ()):
        name = parse_source(entry)[0]
        if name in known and next(stage for stage in before if stage.name == name).kind != "traces":
            raise ConfigError(f"{where}: data={show(entry)}: expected a file, or a stage of kind traces before it")
    return Stage(number, given)


def _checked(table: dict[str, Any], keys: Mapping[str, Key], where: str) -> dict[str, Any]:
    for key, value in table.items():
        if key not in keys:
            near = nearest(key, keys)[0]
            hint = f" (or config.{key})" if key in field_names() else ""
            raise ConfigError(f"{where}: {show(key)}: no such key; the nearest is {near}{hint}")
        if not keys[key].valid(value):
            raise ConfigError(f"{where}: {key}={show(value)}: expected {keys[key].expected}")
    for name, key in keys.items():
        if key.needed and name not in table:
            raise ConfigError(f"{where}: {name}: missing; expected {key.expected}")
    given = {name: table.get(name, key.default) for name, key in keys.items()}
    if given.get("temperature") == 0 and given["samples"] > 1:
        raise ConfigError(f"{where}: samples={given['samples']}: expected 1 with temperature = 0")
    return given


def _flat(table: Mapping[str, Any], where: str, prefix: str = "") -> dict[str, Any]:
    """{"optimizer": {"peak_lr": 1}} as {"optimizer.peak_lr": 1}; of "grpo.task" and the like the stage's own key."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{prefix}{key}".replace("-", "_")
        if isinstance(value, dict):
            flat |= _flat(value, where, f"{name}.")
        elif name not in field_names():
            near = nearest(name, field_names())[0]
            raise ConfigError(f"{where}: config.{show(name)}: no such field; the nearest is {near}")
        elif name in _OWN:
            raise ConfigError(f"{where}: config.{name}={show(value)}: expected as {_OWN[name]} of the stage")
        else:
            flat[name] = value
    return flat


_OWN = {"data.sources": "data", "data.learn": "last_turn", "grpo.task": "task", "grpo.rewards": "rewards"}
