"""A pipeline of post-training, run stage by stage: DeepSeek-R1's, or what a recipe's file says (stages.py).

    run("r1.toml", "runs/r1")

The folder has the recipe, a folder for each stage, which is a run like any other or a data set, the answers by which
the models were measured, and stages.json: what is done, and what came of it. Each stage goes on where it was ended, so
the same call at any time goes on with the pipeline.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from dsjax import config as configuration
from dsjax.config import Config, ConfigError, override, show
from dsjax.data.sources import parse_source, source_files
from dsjax.files import read_json, write_json, write_text
from dsjax.hub.chat import has_template
from dsjax.hub.config import is_hub_folder, read_config
from dsjax.hub.convert import copy_text
from dsjax.hub.load import Loaded, load
from dsjax.posttrain import grpo, stages_picture
from dsjax.posttrain.evaluate import Asked, Asking, ask, check_judged, is_right
from dsjax.posttrain.problem import Problem
from dsjax.posttrain.recipes import RECIPES as GRPO_RECIPES
from dsjax.posttrain.recipes import begin_with
from dsjax.posttrain.rewards.answer import thinking
from dsjax.posttrain.rewards.format import format_reward
from dsjax.posttrain.rewards.language import LANGUAGES, language_reward, words_by_script
from dsjax.posttrain.sft import RECIPES as SFT_RECIPES
from dsjax.posttrain.sft import keep_template, settings, sft
from dsjax.posttrain.stages import BASE, Recipe, Stage, read
from dsjax.posttrain.tasks import open_task
from dsjax.posttrain.traces import distinct, write_traces
from dsjax.train import page
from dsjax.train.checkpoint import has_checkpoint, imported, newest_step
from dsjax.train.folder import owned

TRACES = "traces.jsonl"  # of a stage that makes a data set
_KEPT = "recipe.toml"
_FIRST = 64  # problems of a task by which its rewards are known


def run(
    source: Path | str, run_folder: Path | str, *, quiet: bool = False, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Runs what is not done of a recipe's stages; returns what stages.json holds, and whether all are done.

    source: the recipe's file, or a run folder of one. A recipe may have changed in stages that have not begun. Raises
    ConfigError for what the user can mend, before anything runs where it can be known.
    """
    source, run_folder = Path(source), Path(run_folder)
    recipe = read(source / _KEPT if source.is_dir() else source)
    with owned(run_folder):
        return _Pipeline(recipe, run_folder, quiet, say).go()


class _Pipeline:
    def __init__(self, recipe: Recipe, folder: Path, quiet: bool, say: Callable[[str], None]):
        self.recipe, self.folder, self.quiet, self.say = recipe, folder, quiet, say
        self.base = Path(recipe.base).expanduser()
        self.kept: dict[str, Any] = read_json(folder / "stages.json") or {"stages": [], "measured": {}, "asking": {}}

    def go(self) -> dict[str, Any]:
        recipe, n = self.recipe, len(self.recipe.stages)
        self._check_kept()
        self._check_all()
        write_text(self.folder / _KEPT, recipe.text)
        if self.kept.get("base") != (now := _newest(self.base)):  # of which nothing is made yet
            self.kept["base"], self.kept["measured"] = now, {}
        self._measure(BASE, self.base)
        for stage in recipe.stages:
            if stage.number <= len(self.kept["stages"]):
                if stage.kind != "traces":
                    self._measure(stage.name, self.folder / stage.folder)  # more may be asked than when it was done
                continue
            source = "" if stage.kind == "sft" and stage.source == BASE else f" from {stage.source}"
            self.say(f"stage {stage.number} of {n}, {stage.name}: {stage.kind}{source} -> {self.folder / stage.folder}")
            if self._in_progress() is None:
                self.kept["begun"] = dict(stage.given)
                self._write()
            began = time.perf_counter()
            try:
                came = getattr(self, f"_{stage.kind}")(stage)
            except ConfigError as error:
                raise recipe.error(stage, error) from None
            if came is None:
                self.say(f"stage {stage.number} ({stage.name}) was ended; the same command goes on from there")
                return {**self.kept, "done": False}
            if stage.kind != "traces":
                page.write(
                    self.folder / stage.folder, self.folder / stage.folder / "report.html", None, version("dsjax")
                )
            entry = {"given": dict(stage.given), "folder": stage.folder, **came}
            self.kept["stages"].append({**entry, "seconds": round(time.perf_counter() - began, 1)})
            self._write()
            if stage.kind != "traces":
                self._measure(stage.name, self.folder / stage.folder)
        stages_picture.draw(self.kept, self.folder / "stages.png")
        return {**self.kept, "done": True}

    # What was there before, and what is wrong before anything runs

    def _check_kept(self) -> None:
        """Raises ConfigError where the recipe is another one than that of the stages that are done, or have a
        checkpoint already: of these the run itself says which fields of its configuration may change."""
        where, done = self.recipe.where, self.kept["stages"]
        other = f"choose another --run, or mend {where}"
        if len(done) > len(self.recipe.stages):
            name = done[len(self.recipe.stages)]["given"]["name"]
            raise ConfigError(f"{where}: stage {name} is done in {self.folder}, and now is not there; {other}")
        begun = self._in_progress()
        if (done or begun) and (was := self.kept["base"]) != (now := _newest(self.base)):
            key = next(key for key in now if now[key] != was.get(key))
            raise ConfigError(
                f"{where}: base: {key} is {show(now[key])}, and the stages done in {self.folder} began with "
                f"{show(was.get(key))}; {other}"
            )
        for entry, stage in zip(done, self.recipe.stages):
            was = entry["given"]
            for key, value in stage.given.items():
                if was.get(key) != value:
                    raise ConfigError(
                        f"{where}: stage {stage.number} ({stage.name}): {key}={show(value)}: the stage is done in "
                        f"{self.folder} with {show(was.get(key))}; {other}"
                    )
        if begun:
            stage, was = begun
            same = {key: value for key, value in stage.given.items() if key not in ("epochs", "config")}
            wrong = [(key, value, was.get(key)) for key, value in same.items() if value != was.get(key)]
            fields = was.get("config", {}).items()
            wrong += [(f"config.{name}", None, v) for name, v in fields if name not in stage.given.get("config", {})]
            for key, value, before in wrong:
                raise ConfigError(
                    f"{where}: stage {stage.number} ({stage.name}): {key}={show(value)}: the stage has begun in "
                    f"{self.folder} with {show(before)}; {other}"
                )

    def _in_progress(self) -> tuple[Stage, dict[str, Any]] | None:
        """The stage of which there is a checkpoint, and it is not done; and what it began with."""
        begun, left = self.kept.get("begun"), self.recipe.stages[len(self.kept["stages"]) :]
        if begun is None or not left or left[0].kind == "traces" or left[0].name != begun["name"]:
            return None
        stage, folder = left[0], self.folder / left[0].folder
        return (stage, begun) if has_checkpoint(folder) and not imported(folder) else None

    def _check_all(self) -> None:
        """Raises ConfigError for what is known to be wrong of what is still to be done."""
        where = self.recipe.where
        if not self.base.is_dir() or not (self.base / "config.json").is_file():
            raise ConfigError(f"{where}: base={show(self.recipe.base)}: expected a run folder or a Hub folder")
        if hub := is_hub_folder(self.base):
            configs = {BASE: Config(model=read_config(self.base).model)}
        else:
            configs = {BASE: configuration.load(self.base / "config.json")}
            if not has_checkpoint(self.base):
                raise ConfigError(f"{where}: base={show(self.recipe.base)}: expected a run with a checkpoint")
        for stage in self.recipe.stages:
            if stage.number <= len(self.kept["stages"]):
                if stage.kind != "traces":
                    configs[stage.name] = configuration.load(self.folder / stage.folder / "config.json")
                continue
            try:
                if stage.kind == "sft":
                    configs[stage.name] = self._check_sft(stage, configs[stage.source])
                else:
                    if hub and stage.source == BASE and stage.kind == "grpo":
                        raise ConfigError(
                            f"from=base: a Hub folder; `dsjax convert import {self.recipe.base} runs/NAME` makes a run "
                            "of it"
                        )
                    if stage.kind == "grpo":
                        configs[stage.name] = planned(stage, configs[stage.source])
                    style = stage["style"] if stage.kind == "traces" else configs[stage.name].grpo.style
                    with self._open(stage.given, stage.given.get("seed", 0)) as task:
                        self._check_style(style, stage.source)
                        if stage.given.get("keep") == "right":
                            check_judged(task, [task.problem(n) for n in range(min(stage["problems"], _FIRST))])
            except ConfigError as error:
                raise self.recipe.error(stage, error) from None
        models = [BASE, *(stage.name for stage in self.recipe.stages if stage.kind != "traces")]
        for given in self.recipe.measures:
            if all(self._is_measured(name, given) for name in models):
                continue
            try:
                with self._open(given, given["seed"]) as task:
                    check_judged(task, task.heldout()[: given["problems"]])
                for name in models[1:]:  # the base has means of its own
                    if not self._is_measured(name, given):
                        self._check_style(given["style"], name)
            except ConfigError as error:
                raise ConfigError(f"{where}: measure {given['name']}: {error}") from None

    def _check_style(self, style: str, name: str) -> None:
        """Raises ConfigError where a model is to be asked by a chat template that it will not have."""
        if style == "chat" and not self._has_template(name):
            raise ConfigError(
                f"style=chat: {name} has no chat template; expected template in a stage of kind sft that it comes of, "
                "or style plain"
            )

    def _has_template(self, name: str) -> bool:
        if name == BASE:
            return has_template(self.base)
        stage = self.recipe.stage(name)
        return stage.given.get("template") is not None or self._has_template(stage.source)

    def _check_sft(self, stage: Stage, base: Config) -> Config:
        name = stage["recipe"].replace("-", "_")
        if name not in SFT_RECIPES:
            near = configuration.nearest(name, SFT_RECIPES)[0]
            raise ConfigError(f"recipe={show(stage['recipe'])}: no such recipe; the nearest is {near}")
        base = configuration.replace(base, grpo=None)
        config = override(base, settings(base, SFT_RECIPES[name]) | stage.changes)
        made = [str(self.folder / other.folder / TRACES) for other in self.recipe.stages if other.kind == "traces"]
        there = [source for source in self._data(stage) if parse_source(source)[0] not in made]
        if there:
            source_files(configuration.replace(config.data, sources=tuple(there)))
        if stage["template"] is not None and not Path(stage["template"]).is_file():
            raise ConfigError(f"template={show(stage['template'])}: no such file")
        return config

    def _open(self, given: Mapping[str, Any], seed: int):
        return open_task(given["task"], weights=given["rewards"], seed=seed, heldout=given.get("heldout"))

    # The stages: each returns what stages.json keeps of it, or None if it was ended before its end

    def _sft(self, stage: Stage) -> dict[str, Any] | None:
        folder = self.folder / stage.folder
        sft(
            self._source(stage),
            folder,
            self._data(stage),
            recipe=stage["recipe"],
            epochs=stage["epochs"],
            template=stage["template"],
            last_turn=stage["last_turn"],
            changes=stage.changes,
            quiet=self.quiet,
        )
        return _done(folder)

    def _grpo(self, stage: Stage) -> dict[str, Any] | None:
        folder, source, changes = self.folder / stage.folder, self._source(stage), _changes(stage)
        if has_checkpoint(folder):
            config, begin = override(configuration.load(folder / "config.json"), changes), None
        else:
            config, begin = planned(stage, configuration.load(source / "config.json")), source
        grpo.train(config, folder, source=begin, explicit=changes, quiet=self.quiet)
        return _done(folder)

    def _traces(self, stage: Stage) -> dict[str, Any]:
        folder = self.folder / stage.folder
        folder.mkdir(exist_ok=True)
        names = ("samples", "keep", "most", "temperature", "top_p", "max_tokens", "longest", "language", "style")
        options = {name: stage[name] for name in (*names, "seed", "max_rows")}
        with self._open(stage.given, stage["seed"]) as task:
            problems = distinct(task, stage["problems"])
            loaded, progress = load(self._source(stage)), not self.quiet
            counts = write_traces(
                loaded, task, problems, folder / TRACES, label=stage.source, progress=progress, say=self.say, **options
            )
        if not counts["kept"]:
            raise ConfigError(f"none of {counts['answers']} answers was kept; see {folder / 'traces.answers.jsonl'}")
        self.say(f"kept {counts['kept']:,} of {counts['answers']:,} answers to {counts['problems']:,} problems")
        return {"counts": counts}

    def _source(self, stage: Stage) -> Path:
        return self.base if stage.source == BASE else self.folder / self.recipe.stage(stage.source).folder

    def _data(self, stage: Stage) -> list[str]:
        """Files of conversations with their weights; of a stage's name, the one that it wrote."""
        made = {s.name: str(self.folder / s.folder / TRACES) for s in self.recipe.stages[: stage.number - 1]}
        data = []
        for entry in stage["data"]:
            name, _ = parse_source(entry)
            data.append(made[name] + entry.removeprefix(name) if name in made else entry)
        return data

    # What a model is asked

    def _measure(self, name: str, folder: Path) -> None:
        """Asks a stage's model what it was not asked yet; its answers stay in answers/."""
        measured, loaded = self.kept["measured"].setdefault(name, {}), None
        for given in self.recipe.measures:
            if self._is_measured(name, given):
                continue
            out = self.folder / "answers" / f"{name}-{given['name']}.jsonl"
            out.parent.mkdir(exist_ok=True)
            question, template = {**given, **_newest(folder)}, None
            if name == BASE and given["style"] == "chat" and not has_template(self.base):
                template = next((s["template"] for s in self.recipe.stages if s.given.get("template")), None)
                if template is None:
                    self.say(f"{name}, {given['name']}: not measured: it has no chat template, and no stage brings one")
                    continue
                question["template"] = template
            if self.kept["asking"].get(out.name) != question:  # what is there answers another one
                out.unlink(missing_ok=True)
                self.kept["asking"][out.name] = question
                self._write()
            try:
                loaded = load(folder) if loaded is None else loaded
                asked = loaded if template is None else self._with_template(loaded, template)
                found = self._ask(given, asked, name, out)
            except ConfigError as error:
                raise ConfigError(f"{self.recipe.where}: measure {given['name']}, of {name}: {error}") from None
            measured[given["name"]] = {"asked": dict(given), **found}
            self._write()
            self.say(f"{name}, {given['name']}: {_said(found)}")

    def _ask(self, given: Mapping[str, Any], loaded: Loaded, name: str, out: Path) -> dict[str, Any]:
        asking = Asking(**{field.name: given[field.name] for field in dataclasses.fields(Asking)})
        with self._open(given, given["seed"]) as task:
            problems = task.heldout()[: given["problems"]]
            rows = min(given["max_rows"], len(problems) * asking.samples)
            return summary(
                problems, ask(loaded, task, problems, asking, max_rows=rows, out=out, label=name, say=self.say)
            )

    def _with_template(self, loaded: Loaded, template: str) -> Loaded:
        """The base as it is asked by the chat template that a stage brings; what that needs lies in base/."""
        place = self.folder / BASE
        place.mkdir(exist_ok=True)
        copy_text(self.base, place)
        keep_template(self.base, template, place)
        return dataclasses.replace(loaded, folder=place)

    def _is_measured(self, name: str, given: Mapping[str, Any]) -> bool:
        return self.kept["measured"].get(name, {}).get(given["name"], {}).get("asked") == dict(given)

    def _write(self) -> None:
        write_json(self.folder / "stages.json", self.kept)


def planned(stage: Stage, base: Config) -> Config:
    """The configuration of a stage of policy optimisation. Raises ConfigError."""
    if stage["recipe"].replace("-", "_") not in GRPO_RECIPES:
        near = configuration.nearest(stage["recipe"], GRPO_RECIPES)[0]
        raise ConfigError(f"recipe={show(stage['recipe'])}: no such recipe; the nearest is {near}")
    config = begin_with(base, stage["recipe"], _changes(stage))
    grpo.check(config)
    return config


def _changes(stage: Stage) -> dict[str, Any]:
    own = {"grpo.task": stage["task"], "grpo.rewards": stage["rewards"]}
    return {name: value for name, value in own.items() if value is not None} | stage.changes


def _newest(folder: Path) -> dict[str, Any]:
    """Which weights a folder's model has."""
    return {"run": str(folder.absolute()), "step": None if is_hub_folder(folder) else newest_step(folder)}


def _done(folder: Path) -> dict[str, Any] | None:
    """The steps of a run that is done; None for one that was ended before."""
    if not has_checkpoint(folder) or imported(folder):
        return None
    step = newest_step(folder)
    return {"steps": step} if step >= configuration.load(folder / "config.json").steps else None


def summary(problems: list[Problem], asked: list[Asked]) -> dict[str, Any]:
    """What a stage's row of the table says. language: of the answers that think, the mean share of their words that are
    in the problem's language, where it says which; None if there are none."""
    right = np.array([is_right(one.parts) for one in asked], float).reshape(len(problems), -1).mean(axis=1)
    shares = []
    for one in asked:
        language, words = problems[one.answer.problem].facts.get("language"), words_by_script(thinking(one.text))
        known = isinstance(language, str) and language in LANGUAGES
        if known and "</think>" in one.text and words:
            shares.append(language_reward(one.text, language))
    return {
        "pass@1": float(right.mean()),
        "error": float(np.std(right, ddof=1) / np.sqrt(len(right))) if len(right) > 1 else 0.0,
        "format": float(np.mean([format_reward(one.text, answer_tags=False) for one in asked])),
        "language": float(np.mean(shares)) if shares else None,
        "tokens": float(np.mean([one.answer.n_tokens for one in asked])),
        "cut_off": float(np.mean([one.answer.reason == "length" for one in asked])),
        "problems": len(problems),
    }


def _said(of: Mapping[str, Any]) -> str:
    language = "" if of["language"] is None else f", language {of['language']:.1%}"
    return f"pass@1 {of['pass@1']:.1%}, format {of['format']:.1%}{language}, {of['tokens']:.1f} tokens"


def table(result: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Head and rows: every stage, how long it was, and what its model was measured to be."""
    names = list(dict.fromkeys(name for of in result["measured"].values() for name in of))
    columns = []  # (measure, key, how it is written)
    for name in names:
        found = [of[name] for of in result["measured"].values() if name in of]
        spoken = [("language", "{:.1%}")] if any(of["language"] is not None for of in found) else []
        keys = [("pass@1", "{:.1%}"), ("format", "{:.1%}"), *spoken, ("tokens", "{:.1f}")]
        columns += [(name, key, form) for key, form in keys]
    head = ["stage", "kind", "size", *(f"{name}\n{key}" if len(names) > 1 else key for name, key, _ in columns)]
    rows = []
    stages = {BASE: {"given": {"kind": ""}, "steps": result["base"]["step"]}}
    stages |= {entry["given"]["name"]: entry for entry in result["stages"]}
    for stage, entry in stages.items():
        steps = f"{entry['steps']:,} steps" if entry.get("steps") else ""
        size = f"{entry['counts']['kept']:,} kept" if "counts" in entry else steps
        of = result["measured"].get(stage, {})
        values = [(of.get(name, {}).get(key), form) for name, key, form in columns]
        cells = ["" if value is None else form.format(value) for value, form in values]
        rows.append((stage, entry["given"]["kind"], size, *cells))
    return head, rows
