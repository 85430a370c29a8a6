"""What a person sees of a run, on standard error: facts first, a bar or lines on the way, commands at the end."""

import shlex
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from dsjax.config import Config
from dsjax.plan import count
from dsjax.plan.count import human
from dsjax.train.schedule import Schedule
from sharding.mesh import show_axes

LABEL = 11  # width of the first column
SAMPLE_LINES = 8


class Report:
    """Tells of one run. `quiet`, or standard error that is no terminal: a line a step interval, and no bar."""

    def __init__(self, quiet: bool):
        self.quiet = quiet or not sys.stderr.isatty()
        self.bar: tqdm | None = None

    def say(self, text: str) -> None:
        """A line, or several, above the bar. Of several processes the first one speaks."""
        if jax.process_index() == 0:
            tqdm.write(text, file=sys.stderr)

    def table(self, rows: list[tuple[str, str]]) -> None:
        """Rows of a label and a text, wrapped on a terminal."""
        width = 10_000 if self.quiet else max(40, shutil.get_terminal_size().columns)
        for label, text in rows:
            lines = textwrap.wrap(
                text, width - LABEL, break_long_words=False, break_on_hyphens=False, drop_whitespace=True
            )
            self.say("\n".join(f"{name:{LABEL}}{line}" for name, line in zip([label] + [""] * len(lines), lines)))

    def start_bar(self, done: int, total: int) -> None:
        self.bar = tqdm(
            total=total,
            initial=done,
            disable=self.quiet or jax.process_index() > 0,
            dynamic_ncols=True,
            file=sys.stderr,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}, {remaining} left",
        )

    def step(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def rewind(self, done: int) -> None:
        """The bar goes back to a step."""
        if self.bar is not None:
            self.bar.n = done
            self.bar.refresh()

    def interval(self, row: dict[str, Any], total: int, seconds_left: float | None) -> None:
        """The numbers of a step interval: in the bar, or as a line."""
        speed = "" if row["tokens_per_s"] is None else f", {human(int(row['tokens_per_s']))} tok/s"
        if row["input_s"] is not None:
            speed += f", input {1000 * row['input_s']:.0f} ms"
        loss, norm = _number(row["loss"], 4), _number(row["grad_norm"], 3)
        skipped = f", {row['skipped']} skipped" if row["skipped"] else ""
        skipped += f", {row['overflow']:,} rows dropped" if row["overflow"] else ""
        if self.bar is not None:
            postfix = f"loss {_number(row['loss'], 3)}, MaxVio {_number(row['max_vio_mean'], 2)}{speed}{skipped}"
            self.bar.set_postfix_str(postfix)
        if self.quiet:
            left = "" if seconds_left is None else f", {clock(seconds_left)} left"
            self.say(
                f"step {row['step']}/{total}: loss {loss}, lr {row['learning_rate']:.3g}, grad norm {norm}, "
                f"MaxVio {_number(row['max_vio_mean'], 2)}{skipped}{speed}{left}"
            )

    def evaluation(self, row: dict[str, Any]) -> None:
        if "heldout_bpb" not in row:
            averaged = f", averaged weights {_number(row['ema_heldout_nats'], 4)}" if "ema_heldout_nats" in row else ""
            text = f"held-out loss {_number(row['heldout_nats'], 4)} nats a learned token{averaged}"
            return self.table([(f"step {row['step']}", text)])
        ema = ""
        if "ema_heldout_bpb" in row:
            ema = f", averaged weights {_number(row['ema_heldout_bpb'], 3)}"
        others = f"gzip -9 {row['gzip_bpb']:.3f}, xz -9 {row['xz_bpb']:.3f}"
        text = (
            f"held-out loss {_number(row['heldout_nats'], 4)} nats a token, "
            f"{_number(row['heldout_bpb'], 3)} bits a byte{ema} ({others})"
        )
        self.table([(f"step {row['step']}", text)])

    def sample(self, step: int, prompt: str, text: str) -> None:
        """A continuation, prompt and model apart."""
        if self.quiet:
            return self.say(f"step {step}: sample {prompt!r} -> {text!r}")
        for label, part in (("  prompt", prompt.strip()), ("  model", text.rstrip())):
            lines = part.expandtabs(4).split("\n")[:SAMPLE_LINES]
            lines = ["".join(c if c.isprintable() else "\ufffd" for c in line) for line in lines]
            self.say("\n".join(f"{name:{LABEL - 2}}| {line}" for name, line in zip([label] + [""] * 99, lines)))

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.bar = None


def corpus_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """What the run reads."""
    skipped = [("skipped", ", ".join(f"{n:,} {reason}" for reason, n in facts["skipped"].items()))]
    skipped = skipped if facts["skipped"] else []
    if "learned" in facts["train"]:
        train, held = (
            f"{_n(facts[part]['documents'], 'conversation')}, {facts[part]['tokens']:,} tokens, "
            f"{facts[part]['learned']:,} of them to learn"
            for part in ("train", "heldout")
        )
        tokenizer = f"{facts['tokenizer']}, {facts['vocab_size']:,} tokens"
        names = ", ".join(facts["sources"])
        return [("chats", names), ("training", train), ("held out", held), ("tokenizer", tokenizer), *skipped]
    train, held = (
        f"{_n(facts[part]['documents'], 'document')}, {facts[part]['bytes']:,} bytes, {facts[part]['tokens']:,} tokens"
        for part in ("train", "heldout")
    )
    return [
        ("corpus", f"{', '.join(facts['sources'])} (Python {facts['python']})"),
        ("sha256", facts["sha256"]),
        ("training", train),
        ("held out", held),
        ("to beat", f"gzip -9 {facts['gzip_bpb']:.3f} bits a byte, xz -9 {facts['xz_bpb']:.3f}, on the held-out text"),
        (
            "tokenizer",
            f"{facts['tokenizer']}, {facts['vocab_size']:,} tokens, {facts['bytes_per_token']:.2f} bytes a token",
        ),
        *skipped,
    ]


def plan_rows(config: Config, mesh, facts: dict[str, Any]) -> list[tuple[str, str]]:
    """What is trained, for how long, on what."""
    n = count.parameters(config.model)
    mtp = f"; {human(n.mtp)} more for MTP" if n.mtp else ""
    tokens = Schedule(config).total_tokens
    axes = show_axes(mesh.shape)
    kind = jax.devices()[0].device_kind
    return [
        ("model", f"{human(n.total)} parameters, of which a token uses {human(n.active_body_head)}{mtp}"),
        (
            "steps",
            f"{config.steps:,} of {config.batch_size} x {config.seq_len} tokens: {human(tokens)} tokens, "
            f"{tokens / facts['train']['tokens']:.2f} times the training text",
        ),
        ("devices", _n(mesh.size, f"{kind} device") + (f", mesh {axes}" if axes else "")),
    ]


def farewell_rows(config: Config, run_folder: Path, step: int | None) -> list[tuple[str, str]]:
    """Where everything is, and the command to talk to the model."""
    folder = shlex.quote(str(run_folder))
    if step is None:
        return []
    room = max(1, config.model.max_position_embeddings - 16)  # after a short prompt
    limit = f" --max-tokens {room}" if room < 200 else ""
    asked = '--prompt "def "' if config.data.learn == "text" else '--chat --prompt "Hello"'
    return [
        ("checkpoint", f"{run_folder / 'checkpoints' / str(step)}"),
        ("pictures", f"{run_folder / 'loss.png'}, or tensorboard --logdir {folder}/tensorboard"),
        ("generate", f"dsjax generate {folder} {asked}{limit}"),
    ]


def clock(seconds: float) -> str:
    """1:02:03, or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _number(value: float | None, digits: int) -> str:
    return "NaN" if value is None else f"{value:.{digits}f}"


def _n(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
