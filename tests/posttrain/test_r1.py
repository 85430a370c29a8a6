"""Pipelines: recipes and what is wrong in them; which stage begins with what; kills between stages and within them."""

import json
import shutil
from pathlib import Path

import jax
import models
import pytest
import runs
from click.testing import CliRunner

import configs
from dsjax.cli import cli
from dsjax.config import ConfigError, replace, save
from dsjax.data.tokenizer import BOS, bytes_tokenizer
from dsjax.hub.load import Loaded
from dsjax.posttrain import evaluate, grpo, r1, traces
from dsjax.posttrain.evaluate import Answer, Asked
from dsjax.posttrain.problem import Problem
from dsjax.posttrain.sft import RECIPES, settings
from dsjax.posttrain.stages import EXAMPLE, KINDS, parse, read
from dsjax.train import layout, loop
from dsjax.train.checkpoint import Checkpoints
from dsjax.train.schedule import Schedule
from sharding.mesh import make_mesh

# Recipes.

STAGES = """
base = "BASE"
[[stage]]
name = "cold"
kind = "sft"
data = ["PAIRS"]
[[stage]]
name = "rl"
kind = "grpo"
from = "cold"
task = "LETTERS"
[[stage]]
name = "kept"
kind = "traces"
from = "rl"
task = "LETTERS"
problems = 4
"""


@pytest.mark.parametrize(
    "before, after, message",
    [
        ("base =", "base :", "x.toml: not TOML: Expected '=' after a key in a key/value pair (at line 2, column 6)"),
        ("base =", "bsae =", "x.toml: bsae: no such key; the nearest is base"),
        ('"BASE"', "3", "x.toml: base=3: expected a run folder or a Hub folder"),
        ("[[stage]]", "[[measure]]", "x.toml: stage: missing; expected one or more [[stage]]"),
        ('name = "cold"', "", "x.toml: stage 1: name: missing; expected a name of a-z, 0-9, _ and -"),
        ('name = "cold"', 'name = "A b"', "x.toml: stage 1 (A b): name=A b: expected a name of a-z, 0-9, _ and -"),
        ('kind = "sft"', "", "x.toml: stage 1 (cold): kind: missing; expected sft, grpo or traces"),
        ('kind = "sft"', 'kind = "stf"', "x.toml: stage 1 (cold): kind=stf; expected sft, grpo or traces"),
        ('["PAIRS"]', '"PAIRS"', "x.toml: stage 1 (cold): data=PAIRS: expected a list of one or more texts"),
        ('["PAIRS"]', '["a"]\nepochs = "2"', "x.toml: stage 1 (cold): epochs=2: expected a number greater than 0"),
        ('["PAIRS"]', '["a"]\nepohcs = 2', "x.toml: stage 1 (cold): epohcs: no such key; the nearest is epochs"),
        (
            '["PAIRS"]', '["a"]\nsteps = 2',
            "x.toml: stage 1 (cold): steps: no such key; the nearest is epochs (or config.steps)",
        ),
        (
            '["PAIRS"]', '["a"]\nconfig.optimiser.peak_lr = 2',
            "x.toml: stage 1 (cold): config.optimiser.peak_lr: no such field; the nearest is optimizer.peak_lr",
        ),
        ('["PAIRS"]', '["a"]\nconfig.data.sources = "b"', "x.toml: stage 1 (cold): config.data.sources=b: expected"),
        ('"rl"', '"cold"', "x.toml: stage 2 (cold): name=cold: expected another name than base and those before it"),
        (
            'from = "cold"', 'from = "kept"',
            "x.toml: stage 2 (rl): from=kept: expected base or a stage before it that makes a model; the nearest is",
        ),
        ("problems = 4", "", "x.toml: stage 3 (kept): problems: missing; expected a whole number at least 1"),
        ("problems = 4", "problems = true", "x.toml: stage 3 (kept): problems=true: expected a whole number at least"),
        ("problems = 4", 'problems = 4\nkeep = "best"', "x.toml: stage 3 (kept): keep=best: expected right or all"),
        (
            "problems = 4", 'problems = 4\n[[measure]]\nname = "a"\ntask = "b"\ntop_p = 2',
            "x.toml: measure 1: top_p=2: expected a number greater than 0 and at most 1",
        ),
        (
            "problems = 4", 'problems = 4\n[[measure]]\nname = "a"\ntask = "b"\ntemperature = 0',
            "x.toml: measure 1: samples=4: expected 1 with temperature = 0",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_recipe_is_one_line(before, after, message):
    assert before in STAGES
    text = STAGES.replace(before, after, -1 if before == "[[stage]]" else 1)
    with pytest.raises(ConfigError) as error:
        parse(text, "x.toml")
    assert str(error.value).startswith(message)


def test_the_example_is_the_published_pipeline():
    """Reference section 7.6; and it names every key that a stage of its kind has."""
    recipe = read(EXAMPLE)
    assert [(s.kind, s.source) for s in recipe.stages] == [
        ("sft", "base"), ("grpo", "cold_start"), ("traces", "reasoning_rl"), ("sft", "base"), ("grpo", "sft"),
    ]  # fmt: skip
    assert recipe.stages[3]["data"][0] == "rejection_sampling"
    base = configs.load("v3")
    base = replace(base, model=replace(base.model, max_position_embeddings=65536))
    cold = RECIPES[recipe.stages[0]["recipe"]]
    tuned = Schedule(r1.override(base, settings(base, cold) | {"steps": 1000}))
    assert (cold.epochs, tuned.at(0).learning_rate) == (2, pytest.approx(5e-5))
    first, last = (r1.planned(recipe.stages[n], base) for n in (1, 4))
    for config in (first, last):
        assert config.grpo.group_size == 16 and config.batch_size == 512 and config.grpo.max_tokens == 32_768
        assert config.optimizer.peak_lr == 3e-6 and config.grpo.style == "chat"
    assert (first.grpo.temperature, last.grpo.temperature, last.steps) == (1.0, 0.7, 1712)  # in rounds of 16 steps
    text = EXAMPLE.read_text()
    for key in {key for keys in KINDS.values() for key in keys} - {"seed", "top_p"}:
        assert any(line.lstrip("# ").startswith((f"{key} =", f"{key}.")) for line in text.splitlines()), key
    shown = CliRunner().invoke(cli, ["r1", "--example"])
    assert (shown.exit_code, shown.stdout) == (0, text)


# Order, with stages that do nothing.


def checkpoint(folder, config, step):
    (folder / "checkpoints" / str(step) / "rest").mkdir(parents=True, exist_ok=True)
    save(replace(config, steps=step), folder / "config.json")


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ 'Q' + m.content }}{% endfor %}A<think>"


@pytest.fixture
def places(tmp_path):
    """A base run, conversations, problems, and a recipe that uses them."""
    base = tmp_path / "base"
    base.mkdir()
    checkpoint(base, runs.micro(tmp_path / "texts"), 5)
    pairs = write(tmp_path / "pairs.jsonl", [{"prompt": f"{i}+", "completion": "B"} for i in range(8)])
    letters = [{"prompt": f"{i}?", "answer": "B", "rewards": ["choice"]} for i in range(99)]
    text = EXAMPLE.read_text() + '[[measure]]\nname = "other"\ntask = "data/reasoning.jsonl"\nproblems = 2\n'
    text = text.replace('rewards = "accuracy', 'rewards = "choice').replace("accuracy", "choice")
    text = text.replace('recipe = "r1"', "config = {seq_len = 32, batch_size = 4}")
    for name in ("r1_1", "r1_2"):
        text = text.replace(f'recipe = "{name}"', f'recipe = "{name}"\nconfig.seq_len = 32\nconfig.grpo.max_tokens = 8')
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "r1_template.jinja").write_text(TEMPLATE)
    bytes_tokenizer().save(base / "tokenizer.json")
    letters = write(tmp_path / "data" / "reasoning.jsonl", letters)
    shutil.copy(letters, tmp_path / "data" / "general_problems.jsonl")
    for name in ("cold_start", "general"):
        shutil.copy(pairs, tmp_path / "data" / f"{name}.jsonl")
    text = text.replace("runs/v3-128k", str(base)).replace("data/", f"{tmp_path}/data/")
    text = text.replace("think:1,language:1", "think:0").replace("choice:1,think:1", "choice")
    text = text.replace('"choice:1,think:0"', '"choice"').replace('rewards = "choice"', "")
    (tmp_path / "r1.toml").write_text(text)
    return tmp_path


class Killed(BaseException):
    """As kill -9, but for this process."""


@pytest.fixture
def pretend(monkeypatch):
    """Stages that only leave a checkpoint; what was begun, and at which of them to be killed or stopped."""
    begun, die = [], {}

    def run(kind, folder, source, config, more=()):
        begun.append((kind, folder.name, source and Path(source).name, *more))
        if die.get(folder.name) == "killed":
            raise Killed
        checkpoint(folder, config, 1)
        if die.get(folder.name) == "stopped":
            save(replace(config, steps=2), folder / "config.json")

    def sft(source, folder, data, **_):
        run("sft", folder, source, runs.micro(folder / "t"), [Path(entry).name for entry in data])

    def write_traces(loaded, task, problems, out, **options):
        begun.append(("traces", out.parent.name, options["label"], len(problems)))
        if die.get(out.parent.name) == "killed":
            raise Killed
        out.write_text('{"prompt": "1", "completion": "B"}\n')
        return {"problems": len(problems), "answers": 9, "kept": 5}

    def ask(loaded, task, problems, asking, *, out, label, **_):
        begun.append(("ask", label))
        if die.get(f"ask {label}") == "killed":
            raise Killed
        return [Asked(Answer(n, k, "B", "stop", 3, -1.0), "<think>a</think>B", {"choice": 1.0})
                for n in range(len(problems)) for k in range(asking.samples)]  # fmt: skip

    monkeypatch.setattr(r1, "sft", sft)
    monkeypatch.setattr(r1.grpo, "train", lambda config, folder, source, **_: run("grpo", folder, source, config))
    monkeypatch.setattr(r1, "write_traces", write_traces)
    monkeypatch.setattr(r1, "ask", ask)
    monkeypatch.setattr(r1, "load", lambda folder: Loaded(None, None, None, runs.micro(folder), folder))
    monkeypatch.setattr(r1.page, "write", lambda folder, path, *_: path.write_text("a page"))
    return begun, die


WHOLE = [
    ("sft", "1-cold_start", "base", "cold_start.jsonl"),
    ("grpo", "2-reasoning_rl", "1-cold_start"),
    ("traces", "3-rejection_sampling", "reasoning_rl", 6),
    ("sft", "4-sft", "base", "traces.jsonl", "general.jsonl:1"),
    ("grpo", "5-rl", "4-sft"),
]


def go(places, text=None):
    if text is not None:
        (places / "r1.toml").write_text(text)
    text = (places / "r1.toml").read_text().replace("problems = 100_000", "problems = 6")
    (places / "r1.toml").write_text(text)
    return r1.run(places / "r1.toml", places / "run", quiet=True, say=lambda _: None)


def test_each_stage_begins_with_what_the_recipe_says(places, pretend):
    begun, _ = pretend
    result = go(places)
    assert [one for one in begun if one[0] != "ask"] == WHOLE
    asked = [one[1] for one in begun if one[0] == "ask"]
    assert asked == [stage for stage in ("base", "cold_start", "reasoning_rl", "sft", "rl") for _ in range(2)]
    assert result["done"] and json.loads((places / "run/stages.json").read_text()) == {
        name: value for name, value in result.items() if name != "done"
    }
    assert (places / "run/stages.png").stat().st_size > 10_000 and (places / "run/5-rl/report.html").exists()
    head, rows = r1.table(result)
    assert head[:4] == ["stage", "kind", "size", "reasoning\npass@1"] and len(head) == 9
    assert rows[0][:4] == ("base", "", "5 steps", "100.0%") and rows[3] == (
        "rejection_sampling",
        "traces",
        "5 kept",
        *6 * [""],
    )
    begun.clear()
    assert go(places) == result and r1.run(places / "run", places / "run", say=print) == result and not begun


def test_problems_of_a_short_file_are_sampled_once(places, pretend):
    begun, _ = pretend
    go(places, (places / "r1.toml").read_text().replace("problems = 100_000", "problems = 300"))
    (n,) = [one[3] for one in begun if one[0] == "traces"]
    assert 80 < n < 99  # but for those that are held out


@pytest.mark.parametrize("name", ["1-cold_start", "2-reasoning_rl", "3-rejection_sampling", "ask base", "ask sft"])
def test_killed_anywhere_it_goes_on_there(places, pretend, name):
    begun, die = pretend
    die[name] = "killed"
    with pytest.raises(Killed):
        go(places)
    die.clear()
    killed_in = begun.pop()
    result = go(places)
    stages = [one for one in begun if one[0] != "ask"]
    assert stages == WHOLE and result["done"] and killed_in in begun
    assert len([one for one in begun if one[0] == "ask"]) == 10  # nothing is asked twice


def test_a_base_that_was_trained_on_is_measured_anew_until_a_stage_began_with_it(places, pretend):
    begun, die = pretend
    die["1-cold_start"] = "killed"
    for _ in range(2):
        with pytest.raises(Killed):
            go(places)
    assert begun.count(("ask", "base")) == 2
    (places / "base/checkpoints/5").rename(places / "base/checkpoints/6")
    die.clear()
    go(places)
    assert begun.count(("ask", "base")) == 4
    (places / "base/checkpoints/6").rename(places / "base/checkpoints/7")
    with pytest.raises(ConfigError, match=f"^{places}/r1.toml: base: step is 7, and the stages done in .* with 6; cho"):
        go(places)


def test_a_stopped_stage_ends_the_call_and_is_gone_on_with(places, pretend):
    begun, die = pretend
    die["1-cold_start"] = "stopped"
    result = go(places)
    assert result["done"] is False and result["stages"] == [] and len(begun) == 3
    die.clear()
    shutil.rmtree(places / "run/1-cold_start/checkpoints")
    assert go(places)["done"] is True


def test_stages_that_are_done_keep_to_their_recipe_and_others_may_change(places, pretend):
    begun, die = pretend
    die["5-rl"] = "killed"
    with pytest.raises(Killed):
        go(places)
    die.clear()
    text = (places / "r1.toml").read_text()
    for before, after, message in (
        ("samples = 8", "samples = 4", r"stage 3 \(rejection_sampling\): samples=4: the stage is done in .* with 8"),
        ("[[stage]]", "[[stage]]\nepochs = 3", r"stage 1 \(cold_start\): epochs=3: the stage is done in .* with none"),
        (f'base = "{places}/base"', f'base = "{places}/run/4-sft"', "base: run is .*, and the stages done in"),
    ):
        assert before in text
        with pytest.raises(ConfigError, match=f"^{places}/r1.toml: {message}"):
            go(places, text.replace(before, after, 1))
    first = text[: text.index("# 2. Reinforcement")]
    with pytest.raises(ConfigError, match=r"stage reasoning_rl is done in .*, and now is not there; choose another"):
        go(places, first)
    begun.clear()
    more = text.replace('recipe = "r1_2"', 'recipe = "r1_1"') + '[[measure]]\nname = "third"\ntask = "parity:24"\n'
    assert go(places, more)["done"] is True
    assert begun[0] == ("ask", "base") and ("grpo", "5-rl", "4-sft") in begun
    assert [one[1] for one in begun if one[0] == "ask"].count("cold_start") == 1  # the new question alone


def test_a_base_without_a_chat_template_is_asked_by_that_of_the_first_stage_that_brings_one(
    places, pretend, monkeypatch
):
    _, die = pretend
    monkeypatch.setattr(r1, "ask", evaluate.ask)
    asked = []

    def sample(loaded, prompts, asking, *_):
        asked.append(loaded.tokenizer.decode(prompts[0], False))
        return [Answer(n, k, "B", "stop", 3, -1.0) for n in range(len(prompts)) for k in range(asking.samples)]

    monkeypatch.setattr(evaluate, "_ask", sample)
    die["1-cold_start"] = "killed"
    with pytest.raises(Killed):
        go(places)
    assert len(asked) == 2 and all(text.startswith(f"{BOS}Q") and text.endswith("?A<think>") for text in asked)
    assert not (places / "base" / "chat_template.jinja").exists()
    text, said = FITS + '[[measure]]\nname = "a"\ntask = "LETTERS"\nproblems = 2\n', []
    text = text[: text.index('[[stage]]\nname = "rl"')] + text[text.index("[[measure]]") :]
    for name, path in {"LETTERS": places / "data" / "reasoning.jsonl", "PAIRS": places / "pairs.jsonl"}.items():
        text = text.replace(name, str(path))
    (places / "x.toml").write_text(text.replace("BASE", str(places / "base")))
    with pytest.raises(ConfigError, match="measure a: style=chat: cold has no chat template"):
        r1.run(places / "x.toml", places / "without", quiet=True, say=said.append)


def test_a_base_that_cannot_be_asked_is_left_out_of_the_table(places, pretend):
    """Its one stage brings no template, and none is needed: it makes data."""
    begun, _ = pretend
    text = FITS[: FITS.index("[[stage]]")] + FITS[FITS.index('[[stage]]\nname = "kept"') :].replace('from = "rl"', "")
    text += '[[measure]]\nname = "a"\ntask = "LETTERS"\nproblems = 2\n'
    text = text.replace("LETTERS", str(places / "data" / "reasoning.jsonl")).replace("BASE", str(places / "base"))
    (places / "x.toml").write_text(text)
    said = []
    result = r1.run(places / "x.toml", places / "run", quiet=True, say=said.append)
    assert said[0] == "base, a: not measured: it has no chat template, and no stage brings one"
    assert result["done"] and [one[0] for one in begun] == ["traces"]
    assert r1.table(result)[1] == [("base", "", "5 steps"), ("kept", "traces", "5 kept")]


@pytest.mark.parametrize(
    "before, after, message",
    [
        ('recipe = "r1_1"', 'recipe = "r1_2"', "recipe=r1_2: the stage has begun in .* with r1_1; choose another"),
        ('from = "cold_start"', 'from = "base"', "from=base: the stage has begun in .* with cold_start; choose"),
        ("config.seq_len = 32\n", "", "config.seq_len=none: the stage has begun in .* with 32; choose another --run"),
        ("config.steps = 10_000", "config.steps = 10_016", None),
    ],
)
def test_a_stage_in_progress_keeps_to_its_recipe(places, pretend, before, after, message):
    begun, die = pretend
    die["2-reasoning_rl"] = "stopped"
    assert go(places)["done"] is False
    die.clear()
    text = (places / "r1.toml").read_text()
    at = text.index('name = "reasoning_rl"')
    assert before in text[at:]
    text = text[:at] + text[at:].replace(before, after, 1)
    begun.clear()
    if message is None:
        assert go(places, text)["done"]
        return
    for _ in range(2):  # what was refused is not what it began with
        with pytest.raises(ConfigError, match=rf"^{places}/r1.toml: stage 2 \(reasoning_rl\): {message}"):
            go(places, text)
    assert not begun


def test_a_fine_tuning_in_progress_keeps_to_its_template_and_turns(places, pretend):
    _, die = pretend
    die["1-cold_start"] = "stopped"
    go(places)
    text = (places / "r1.toml").read_text()
    for before, after, message in (
        (f'template = "{places}/data/r1_template.jinja"', "", "template=none: the stage has begun in .* with /"),
        ("# last_turn = false", "last_turn = true", "last_turn=true: the stage has begun in .* with false"),
        (", batch_size = 4", "", "config.batch_size=none: the stage has begun in .* with 4"),
    ):
        assert before in text
        with pytest.raises(ConfigError, match=rf"^{places}/r1.toml: stage 1 \(cold_start\): {message}"):
            go(places, text.replace(before, after, 1))
    (places / "base/checkpoints/5").rename(places / "base/checkpoints/6")
    with pytest.raises(ConfigError, match=r"base: step is 6, and the stages done in .* with 5; choose another --run"):
        go(places, text)
    (places / "base/checkpoints/6").rename(places / "base/checkpoints/5")
    assert go(places, text.replace("# epochs = 3", "epochs = 3"))["done"] is False  # more passes may be asked for


FITS = STAGES.replace("data =", "config = {seq_len = 32, batch_size = 4}\ndata =").replace(
    'from = "cold"', 'from = "cold"\nrecipe = "small"\nconfig = {seq_len = 32, batch_size = 8}'
)
FITS = FITS.replace("problems = 4", 'problems = 4\nstyle = "plain"')


@pytest.mark.parametrize(
    "before, after, message",
    [
        ('"BASE"', '"none"', "base=none: expected a run folder or a Hub folder"),
        ('["PAIRS"]', '["none.jsonl"]', "stage 1 (cold): data.sources=none.jsonl: no such file or folder"),
        ('["PAIRS"]', '["PAIRS"]\nrecipe = "r2"', "stage 1 (cold): recipe=r2: no such recipe; the nearest is r1"),
        ('["PAIRS"]', '["PAIRS"]\ntemplate = "x"', "stage 1 (cold): template=x: no such file"),
        ("seq_len = 32, ", "", "stage 1 (cold): seq_len=32768: expected at most model.max_position_embeddings=96"),
        ("seq_len = 32", 'optimizer.peak_lr = "x"', "stage 1 (cold): optimizer.peak_lr=x: expected a number"),
        ("batch_size = 8}", "grpo.max_tokens = 99}", "stage 2 (rl): grpo.max_tokens=99: expected less than seq_len=32"),
        ('"small"', '"r1_3"', "stage 2 (rl): recipe=r1_3: no such recipe; the nearest is r1_"),
        ('"LETTERS"', '"partiy:24"', "stage 2 (rl): task=partiy:24: expected a .jsonl file, gym:NAME, or parity:BITS"),
        ('"LETTERS"', '"LETTERS"\nrewards = "chioce"', "stage 2 (rl): rewards: chioce: no such reward; the nearest is"),
        ('"plain"', '"plain"\n[[measure]]\nname = "a"\ntask = "b"', "measure a: task=b: expected a .jsonl"),
        (
            '"plain"',
            '"chat"',
            "stage 3 (kept): style=chat: rl has no chat template; expected template in a stage of ki",
        ),
        (
            "batch_size = 8",
            'grpo.style = "chat"',
            "stage 2 (rl): style=chat: cold has no chat template; expected templ",
        ),
        (
            '"plain"',
            '"plain"\n[[measure]]\nname = "a"\ntask = "LETTERS"',
            "measure a: style=chat: cold has no chat template; expected template in a stage of kind sft that it",
        ),
        (
            '"plain"',
            '"plain"\n[[measure]]\nname = "a"\ntask = "ASKED"\nrewards = "format"\nstyle = "plain"',
            "measure a: rewards=format: problem 0: expected one of",
        ),
        ('"plain"', '"plain"\ntemperature = 0', "stage 3 (kept): samples=4: expected 1 with temperature = 0"),
        (
            '"LETTERS"\nproblems',
            '"ASKED"\nrewards = "think"\nproblems',
            "stage 3 (kept): rewards=think: problem 0: expected one of",
        ),
    ],
)
def test_what_cannot_be_is_said_before_anything_runs(places, pretend, before, after, message):
    assert before in FITS
    files = {"LETTERS": places / "data" / "reasoning.jsonl", "PAIRS": places / "pairs.jsonl", "BASE": places / "base"}
    files["ASKED"] = write(places / "asked.jsonl", [{"prompt": f"{i}?", "answer": "B"} for i in range(99)])
    text = FITS.replace(before, after, 1)
    for name, path in files.items():
        text = text.replace(name, str(path))
    (places / "x.toml").write_text(text)
    result = CliRunner().invoke(cli, ["r1", f"{places}/x.toml", "--run", f"{places}/run"])
    assert result.exit_code == 2 and not pretend[0]
    assert result.stderr.startswith(f"dsjax: {places}/x.toml: {message}"), result.stderr


def test_a_summary_says_what_was_measured():
    problems = [Problem("1", facts={"language": "en"}), Problem("2", facts={"language": "en"})]

    def one(n, text, right, tokens=4):
        return Asked(Answer(n, 0, text, "stop", tokens, -1.0), text, {"choice": right})

    asked = [
        one(0, "<think>ab αβ</think>B", 1.0),
        one(0, "B", 0.0),
        one(1, "<think>ab</think>C", 0.0, 8),
        one(1, "C", 0.0),
    ]
    found = r1.summary(problems, asked)
    assert found["pass@1"] == 0.25 and found["error"] == pytest.approx(0.25) and found["format"] == 0.5
    assert found["language"] == 0.75 and found["tokens"] == 5 and found["cut_off"] == 0
    assert r1.summary(problems, asked[1:2] + asked[3:])["language"] is None
    several = [Problem("1", facts={"language": ["en", "de"]})]
    assert r1.summary(several, asked[:2])["language"] is None


# A whole one, at toy scale.

TOY = """
base = "BASE"
[[stage]]
name = "cold_start"
kind = "sft"
data = ["PAIRS"]
config = {seq_len = 32, batch_size = 4, steps = 2, checkpoint_every = 1}
[[stage]]
name = "reasoning_rl"
kind = "grpo"
from = "cold_start"
task = "LETTERS"
rewards = "choice:1,think:1,language:1"
config = {seq_len = 32, batch_size = 4, steps = 2, checkpoint_every = 1, GRPO}
[[stage]]
name = "rejection_sampling"
kind = "traces"
from = "reasoning_rl"
task = "LETTERS"
rewards = "choice:1,think:1,language:1"
problems = 6
samples = 2
keep = "all"
style = "plain"
max_tokens = 8
[[stage]]
name = "sft"
kind = "sft"
data = ["rejection_sampling", "PAIRS:2"]
config = {seq_len = 32, batch_size = 4, steps = 1}
[[stage]]
name = "rl"
kind = "grpo"
from = "sft"
recipe = "r1_2"
task = "LETTERS:0.5,parity:8:0.5"
rewards = "choice:1,think:1,language:1,accuracy:1"
config = {seq_len = 32, batch_size = 4, steps = 2, GRPO}
[[measure]]
name = "letters"
task = "LETTERS"
problems = 3
samples = 2
max_tokens = 8
style = "plain"
"""
GRPO = """grpo = {style = "plain", group_size = 2, updates = 1, max_tokens = 8, eval_prompts = 2, eval_samples = 1}"""


@pytest.mark.slow
def test_a_whole_pipeline_and_one_that_is_killed_in_every_stage_come_to_the_same(
    tmp_path, tmp_path_factory, monkeypatch
):
    monkeypatch.setattr(layout, "devices", lambda: jax.devices()[:1])
    monkeypatch.setattr(grpo, "devices", lambda: jax.devices()[:1])
    monkeypatch.setattr(loop.Recorder, "draw", lambda *_, **__: None)
    base = tmp_path / "base"
    base.mkdir()
    config = runs.micro(base / "texts")
    bytes_tokenizer().save(base / "tokenizer.json")
    ends = {"eos_token_id": [1, *range(134, 262)]}  # every other token ends a random answer
    (base / "generation_config.json").write_text(json.dumps(ends))
    save(config, base / "config.json")
    with jax.set_mesh(make_mesh(jax.devices()[:1])), Checkpoints(base) as checkpoints:
        checkpoints.save(5, models.state(config), {"steps": [], "load": []})
    pairs = write(tmp_path / "pairs.jsonl", [{"prompt": f"{i}+", "completion": "B"} for i in range(12)])
    letters = [{"prompt": f"{i}?", "answer": "B", "language": "el"} for i in range(150)]  # worth 1 without a letter
    for record in letters:
        record["rewards"] = ["choice", "think", "language"]
    write(tmp_path / "letters.jsonl", letters)
    text = TOY.replace("GRPO", GRPO).replace("BASE", str(base)).replace("PAIRS", str(pairs))
    (tmp_path / "r1.toml").write_text(text.replace("LETTERS", f"{tmp_path}/letters.jsonl"))
    with runs.compiled_once(tmp_path_factory):
        shown = CliRunner().invoke(cli, ["r1", f"{tmp_path}/r1.toml", "--run", f"{tmp_path}/whole", "--quiet"])
        assert shown.exit_code == 0, shown.output
        assert "rejection_sampling  traces" in shown.stdout and "stages.png" in shown.stdout
        killed = tmp_path / "killed"
        for place, attribute, after in (
            (loop.Run, "_batch", 1),  # cold start: after a step
            (r1, "summary", 0),  # when it was asked, before that is written
            (grpo.Run, "_learn", 1),  # policy optimisation: after a step
            (traces, "write_text", 0),  # rejection sampling: all is sampled, and nothing written
            (loop.Run, "_batch", 0),  # fine-tuning again: before a step
            (grpo.Run, "_groups", 1),  # the last stage
        ):
            with monkeypatch.context() as patch, pytest.raises(Killed):
                kill_at(patch, place, attribute, after)
                r1.run(tmp_path / "r1.toml", killed, quiet=True, say=print)
        result = r1.run(killed, killed, quiet=True, say=print)
    whole = json.loads((tmp_path / "whole/stages.json").read_text())
    assert result["done"] and result["measured"] == whole["measured"] and len(result["measured"]) == 5
    for stage in ("1-cold_start", "2-reasoning_rl", "4-sft", "5-rl"):
        rows = [
            [row for row in runs.rows(path / stage) if row["kind"] == "train"] for path in (tmp_path / "whole", killed)
        ]
        for one, other in zip(*rows, strict=True):
            same = {name for name in one if not name.endswith(("_s", "seconds"))}
            assert {name: one[name] for name in same} == {name: other[name] for name in same}, stage
        assert "<html" in (killed / stage / "report.html").read_text()
    name = "3-rejection_sampling/traces.jsonl"
    assert (killed / name).read_text() == (tmp_path / "whole" / name).read_text() != ""


def kill_at(patch, place, attribute, after):
    """At the call of a function behind so many of them."""
    start, taken = getattr(place, attribute), iter(range(1000))

    def call(*args, **kwargs):
        if next(taken) == after:
            raise Killed
        return start(*args, **kwargs)

    patch.setattr(place, attribute, call)
