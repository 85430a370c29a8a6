"""Supervised fine-tuning: conversations into rows, and then a training run like any other, from given weights.

    sft("runs/tiny", "runs/tiny-sft", ["chats.jsonl"], changes={"optimizer.peak_lr": 1e-3})

The recipes are the published ones (reference sections 7.4 and 7.6); what was not published says so. Rows hold whole
conversations that do not see each other, as in DeepSeek-V3 (arXiv:2412.19437), section 5.1.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile
from typing import Any

from dsjax import config as configuration
from dsjax.config import Config, ConfigError, nearest, override, replace, show
from dsjax.data.chats import load_chats
from dsjax.data.corpus import read_facts
from dsjax.data.pipeline import Corpus, TrainRows
from dsjax.data.tokenizer import Tokenizer, special_tokens
from dsjax.files import read_json, write_text
from dsjax.hub.chat import TEMPLATE, ChatTemplate
from dsjax.hub.config import is_hub_folder
from dsjax.hub.convert import import_checkpoint
from dsjax.posttrain.chats import fingerprint_of, load_template, put_chats
from dsjax.train import loop, processes
from dsjax.train.checkpoint import has_checkpoint, imported
from dsjax.train.phase import origin

LARGEST_BATCH = 64  # of recipes whose batch was not published
EVALUATIONS = 10  # of a run, and as many checkpoints


@dataclass(frozen=True)
class Recipe:
    """Settings by dotted name, and how often every conversation is seen."""

    epochs: float
    changes: Mapping[str, Any]


def _cosine(first: float, last: float, **changes) -> dict[str, Any]:
    return {
        "optimizer.schedule": "cosine",
        "optimizer.peak_lr": first,
        "optimizer.final_lr_ratio": last / first,
        **changes,
    }


def _constant(rate: float, **changes) -> dict[str, Any]:
    return {"optimizer.schedule": "constant", "optimizer.peak_lr": rate, **changes}


_STUDENTS = {  # R1's distilled students, by their first learning rate
    "qwen_1_5b": 1e-4,
    "qwen_7b": 8e-5,
    "qwen_14b": 7e-5,
    "qwen_32b": 6e-5,
    "llama_8b": 5e-5,
    "llama_70b": 2e-5,
}
RECIPES: dict[str, Recipe] = {
    "v3": Recipe(2, _cosine(5e-6, 1e-6)),
    "r1": Recipe(2, _cosine(5e-5, 5e-6, batch_size=128, seq_len=32_768)),  # 2 to 3 epochs
    "v2": Recipe(2, _constant(5e-6)),  # the schedule was not published
    "moe_16b": Recipe(8, _constant(1e-5, batch_size=1024, seq_len=4096)),
    "distill": Recipe(2, _cosine(1e-4, 1e-5, batch_size=64)),  # the students' with rows as the student has them
    **{  # 2 to 3 epochs
        f"distill_{name}": Recipe(2, _cosine(rate, rate / 10, batch_size=64, seq_len=32_768))
        for name, rate in _STUDENTS.items()
    },
}


def sft(
    source: Path | str,
    run_folder: Path | str,
    data: Sequence[str] = (),
    *,
    recipe: str | None = None,
    epochs: float | None = None,
    template: Path | str | None = None,
    last_turn: bool = False,
    teach: Callable[[Config, Path], None] | None = None,
    changes: Mapping[str, Any] | None = None,
    **options,
) -> dict[str, Any]:
    """Tunes the model of a run folder or Hub folder on the conversations of .jsonl files; or goes on with a run of it.

    recipe: a name of RECIPES, v3 if not given; epochs: passes over the conversations, those of the recipe if not given,
    where `changes` (configuration fields by dotted name) has no steps. template: a chat template's file instead of the
    folder's. last_turn: of a conversation only the assistant's last turn is learned. teach: called with configuration
    and run folder once the conversations are in it, to put a teacher's probabilities there (dsjax.posttrain.teacher).
    options: as loop.train takes them.
    Returns the last held-out numbers. Raises ConfigError for what the user can mend.
    """
    source, run_folder, changes = Path(source), Path(run_folder), dict(changes or {})
    changes = {name.replace("-", "_"): value for name, value in changes.items()}
    if recipe is not None and recipe.replace("-", "_") not in RECIPES:
        raise ConfigError(f"--recipe={show(recipe)}: no such recipe; the nearest is {nearest(recipe, RECIPES)[0]}")
    chosen = RECIPES[(recipe or "v3").replace("-", "_")]
    given = {"data.sources": list(data)} if data else {}
    given |= {"data.learn": "last_turn"} if last_turn else {}
    if _has_begun(run_folder):
        _check_import(source, run_folder)
        typed = (chosen.changes if recipe is not None else {}) | changes
        return _go_on(source, run_folder, given, typed, chosen.epochs if recipe else None, epochs, template, options)
    if not data and "data.sources" not in changes:
        raise ConfigError("--data: missing; expected one or more .jsonl files of conversations")

    hub = is_hub_folder(source)
    if hub:
        start = override(Config(), {name: value for name, value in changes.items() if name.startswith("distributed.")})
        import_hub(source, run_folder, start, options.get("quiet", False))
    base = replace(configuration.load((run_folder if hub else source) / "config.json"), grpo=None)
    tuned = override(base, settings(base, chosen) | {"data.learn": "assistant"} | given | changes)
    tuned = replace(tuned, name=base.name if base.name.endswith("-sft") else f"{base.name}-sft")

    def ready(config: Config, make: bool) -> Config:
        if make:
            keep_template(source, template, run_folder)
            put_chats(config, run_folder, progress=not options.get("quiet", False))
            if teach is not None:
                teach(config, run_folder)
        corpus = load_chats(config.data, config.model.vocab_size, run_folder)
        config = planned(config, corpus, chosen.epochs if epochs is None else epochs, changes)
        if make and imported(run_folder):  # whose configuration is in the folder already
            configuration.save(config, run_folder / "config.json")
        return config

    return loop.train(tuned, run_folder, source=None if hub else source, weights_alone=True, ready=ready, **options)


def settings(base: Config, recipe: Recipe) -> dict[str, Any]:
    """What a recipe changes of the run that it begins with, by dotted name."""
    batch_size = recipe.changes.get("batch_size", min(LARGEST_BATCH, base.batch_size))
    return {
        "batch_size": batch_size,
        "accumulate": base.accumulate if batch_size % base.accumulate == 0 else 1,
        "batch_size_start": None,
        "batch_ramp_tokens": 0,
        "optimizer.warmup_steps": 0,  # this and the next two were not published: the last of pre-training
        "balance.bias_update_speed": 0.0,
        "mtp.loss_weight": base.mtp.loss_weight_final,
        "data.tokenizer": "run",
        "data.packing": "best_fit",
        "data.document_mask": True,
        "data.fim_rate": 0.0,
        "data.split_rate": 0.0,
        "data.teacher_top_k": 0,
        **recipe.changes,
    }


def planned(config: Config, corpus: Corpus, epochs: float, changes: Mapping[str, Any]) -> Config:
    """The configuration with its steps, so many that every conversation is seen `epochs` times, and when it is
    evaluated and saved; what is among `changes` stays.

    The last step goes on into the next epoch where the rows do not come out even. Raises ConfigError for a batch that
    is larger than all of them.
    """
    n_rows = TrainRows(corpus, config.data, config.seq_len, config.seed).rows_in(epochs)
    steps = config.steps if "steps" in changes else math.ceil(n_rows / config.batch_size)
    if "steps" not in changes and n_rows < config.batch_size:
        raise ConfigError(
            f"batch_size={config.batch_size}: {epochs:g} epochs of these conversations are {n_rows:,} rows of "
            f"{config.seq_len:,} tokens; expected at most that, or --steps=N"
        )
    every = max(1, math.ceil(steps / EVALUATIONS))
    times = {"log_every": max(1, min(10, every)), "eval_every": every, "checkpoint_every": every}
    return replace(config, steps=steps, **{name: n for name, n in times.items() if name not in changes})


def _has_begun(run_folder: Path) -> bool:
    """Whether the folder holds a run with a checkpoint of its own. Raises ConfigError if that is no fine-tuning."""
    if not has_checkpoint(run_folder) or imported(run_folder):
        return False
    if configuration.load(run_folder / "config.json").data.learn == "text":
        raise ConfigError(f"{run_folder}: holds a run of `dsjax train`; choose another --run")
    return True


def _go_on(source, run_folder, given, typed, recipe_epochs, epochs, template, options) -> dict[str, Any]:
    """The run that the folder holds, with what was asked for now; its conversations must be the same."""
    config = configuration.load(run_folder / "config.json")
    facts = read_facts(run_folder / "data", None)
    if "data.sources" in given and facts is not None:
        asked = override(config, {"data.sources": given["data.sources"]})
        if fingerprint_of(asked, run_folder) != facts["sha256"]:
            raise ConfigError(
                f"--data={','.join(given['data.sources'])}: not the conversations that the run in {run_folder} began "
                "with; choose another --run"
            )
        if config.data.learn == "last_turn" and "data.learn" not in given | typed:
            raise ConfigError(f"--last-turn: missing; the run in {run_folder} began with it, and cannot change it")
    if template is not None and (kept := load_template(run_folder)) and kept.source != _read(template):
        raise ConfigError(
            f"--template={template}: not the one that the run in {run_folder} began with; choose another --run"
        )
    epochs = recipe_epochs if epochs is None else epochs
    if epochs is not None and "steps" not in typed:
        corpus = load_chats(config.data, config.model.vocab_size, run_folder)
        typed = typed | {"steps": planned(config, corpus, epochs, {}).steps}
    if "data.learn" in given:
        typed = typed | {"data.learn": given["data.learn"]}
    began = source if origin(run_folder) is not None else None
    return loop.train(override(config, typed), run_folder, source=began, explicit=typed, **options)


def import_hub(source: Path, run_folder: Path, start: Config, quiet: bool) -> None:
    """The weights of a Hub folder as the run's checkpoint 0, unless they are there; and the configuration as it is
    imported, whatever an attempt that took no step made of it. Raises ConfigError where they are another folder's."""

    def make(first: bool) -> None:
        if not first:
            return
        if not has_checkpoint(run_folder):
            import_checkpoint(source, run_folder, say=print if not quiet else lambda _: None, progress=not quiet)
        _check_import(source, run_folder)
        if imported(run_folder) and (run_folder / "hub" / "run.json").is_file():
            copyfile(run_folder / "hub" / "run.json", run_folder / "config.json")

    processes.start(start.distributed)
    with processes.together(start.distributed.heartbeat_timeout_s):
        processes.first_alone(make)


def _check_import(source: Path, run_folder: Path) -> None:
    was = read_json(run_folder / "hub" / "source.json").get("folder")
    if was is not None and was != str(source.absolute()):
        raise ConfigError(f"{source}: the run in {run_folder} began with {was}; choose another --run")


def keep_template(source: Path, file: Path | str | None, run_folder: Path) -> None:
    """Puts the chat template into the run folder, with names of the special tokens where the run had none, so that
    `dsjax generate --chat` and `dsjax serve` render as it was trained."""
    found = load_template(source) if file is None else ChatTemplate(_read(file), str(file))
    if found is None:
        (run_folder / TEMPLATE).unlink(missing_ok=True)  # of an attempt that took no step
        return
    write_text(run_folder / TEMPLATE, found.source)
    if not special_tokens(run_folder) and not (run_folder / "tokenizer_config.json").exists():
        tokenizer = Tokenizer.load(run_folder)
        ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
        names = {name: tokenizer.backend.id_to_token(id) for name, id in ids.items()}
        write_text(run_folder / "tokenizer_config.json", json.dumps(names, indent=2, ensure_ascii=False) + "\n")


def _read(path: Path | str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"--template={path}: not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise ConfigError(f"--template={path}: {error.strerror}") from None
