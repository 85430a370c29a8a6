"""`dsjax data`: text into shards, and a look at what a model will read."""

from pathlib import Path

import click

from dsjax.cli.output import note, print_table
from dsjax.cli.verb import NATURAL, POSITIVE, Dsjax, Number
from dsjax.config import ConfigError, load
from dsjax.plan.count import human

RATE = Number(float, "a number between 0 and 1", lambda r: 0 <= r <= 1)
FRACTION = Number(float, "a number between 0 and 1", lambda r: 0 < r < 1)
FIELD = click.option(
    "--text-field", default="text", show_default=True, help="Of .jsonl, .parquet, ArrayRecord records."
)
ON_ERROR = click.option(
    "--on-error", type=click.Choice(["raise", "skip"]), default="raise", show_default=True, help="A bad line or file."
)
STYLES = {"learned": "green", "prefix": "green", "suffix": "blue", "middle": "bold magenta", "special": "dim"}


@click.group(
    cls=Dsjax,
    short_help="Tokenise text once for all runs, and look at it.",
    epilog="""\b
Examples:
  dsjax data build stdlib shards/stdlib --tokenizer=runs/tiny
  dsjax data inspect shards/stdlib
  dsjax train tiny --run runs/mine --data.sources=shards/stdlib""",
)
def data():
    """Text into a folder of token shards that any number of runs train from, and what is in it."""


@data.command(
    short_help="Shards of tokens from text.",
    epilog="""\b
Examples:
  dsjax data build stdlib shards/stdlib --tokenizer=runs/tiny
  dsjax data build crawl/ gs://bucket/crawl --tokenizer=DeepSeek-V3/ --split-rate=0.1""",
)
@click.argument("sources", nargs=-1, required=True)
@click.argument("out")
@click.option("--tokenizer", default="bytes", show_default=True, help="bytes, a tokenizer.json, or a folder with one.")
@click.option("--workers", type=POSITIVE, metavar="N", help="Processes that tokenise.  [default: one a core]")
@click.option("--shard-tokens", type=POSITIVE, default=1 << 26, show_default=True, help="Tokens a file.")
@click.option(
    "--split-rate", type=RATE, default=0.0, help="Part of the tokens of punctuation with line breaks to split."
)
@click.option("--seed", type=NATURAL, default=0, help="Of the split.")
@click.option(
    "--heldout-fraction", type=FRACTION, default=0.02, show_default=True, help="Documents kept for evaluation."
)
@FIELD
@ON_ERROR
@click.option("--quiet", is_flag=True, help="No bar.")
def build(sources: tuple[str, ...], out: str, quiet: bool, **options):
    """Tokenise SOURCES into the folder OUT, a path or a URL (gs://, s3://).

    SOURCES are as in data.sources: stdlib, files, folders, globs. The same command goes on with a build that was
    stopped. The result is the same, byte for byte, whatever the workers.
    """
    from dsjax.data.build import build

    try:
        manifest = build(list(sources), out, progress=not quiet, **options)
    except ConfigError as error:
        text = str(error).replace("--data.", "--").replace("data.text_field", "--text-field")
        raise ConfigError(text.replace("--on_error", "--on-error")) from None
    train, heldout = (manifest.total(part) for part in ("train", "heldout"))
    note(
        f"{out}: {train['tokens']:,} tokens of {train['documents']:,} documents in {len(manifest.train):,} shards, "
        f"{heldout['tokens']:,} held out; `dsjax train PRESET --data.sources={out}` trains on them"
    )


@data.command(
    short_help="What a model will read.",
    options_metavar="[OPTION]...",
    epilog="""\b
Examples:
  dsjax data inspect shards/stdlib --verify
  dsjax data inspect shards/stdlib --fim-rate=0.5 --row=7 --seq-len=512
  dsjax data inspect runs/tiny --row=0""",
)
@click.argument("what", nargs=-1, required=True)
@click.option("--n", "count", type=NATURAL, default=2, show_default=True, help="Documents to show.")
@click.option("--row", type=NATURAL, metavar="R", default=0, show_default=True, help="Packed row of training to show.")
@click.option("--seq-len", type=POSITIVE, help="Tokens a row.  [default: the run's, or 4096]")
@click.option("--packing", type=click.Choice(["concat", "best_fit"]), help="How rows are made.  [default: the run's]")
@click.option("--fim-rate", type=RATE, help="Part of the documents turned to prefix-suffix-middle.")
@click.option("--seed", type=NATURAL, help="Which documents and rows.  [default: the run's, or 0]")
@click.option(
    "--tokenizer", default="bytes", show_default=True, help="For text: bytes, a tokenizer.json or its folder."
)
@click.option("--chars", type=POSITIVE, default=400, show_default=True, help="Characters of a part, at most.")
@FIELD
@ON_ERROR
@click.option("--verify", is_flag=True, help="Read every shard whole and name the damaged.")
def inspect(what: tuple[str, ...], verify: bool, count: int, row: int, chars: int, **options):
    """Show WHAT is trained on: a folder of shards, text sources, or a run.

    Its numbers, some documents, and a packed row. Special tokens, the parts of fill-in-the-middle and what is learned
    of conversations have colours on a terminal, and marks elsewhere.
    """
    from dsjax.data import show
    from dsjax.data.pipeline import train_rows

    if verify:
        return _verify(what)
    corpus, config, seq_len, seed = _find(what, options)
    for s in corpus.stored:
        _print_manifest(s.place, s.manifest)
    printer = Printer(chars)
    documents = show.sample_documents(corpus, config, count, seed) if config.learn == "text" else []
    for number, tokens in enumerate(documents, 1):
        printer.rule(f"document {number}, {len(tokens):,} tokens")
        printer.parts(show.document_parts(tokens, corpus.tokenizer, config.fim_rate, seed, number))
    packed = train_rows(corpus, config, seq_len, seed, note)[row]
    used = int((packed["segment_ids"] > 0).sum())
    pieces = show.row_parts(packed, corpus.tokenizer)
    printer.rule(f"row {row}: {used:,} of {seq_len:,} tokens, {len(pieces)} documents or pieces, {config.packing}")
    for number, parts in enumerate(pieces, 1):
        printer.rule(f"segment {number}", "-")
        printer.parts(parts)


def _find(what: tuple[str, ...], options: dict):
    """The corpus that the words stand for, and its data settings, row length and seed."""
    from dsjax.config import DataConfig, replace
    from dsjax.data import show
    from dsjax.data.pipeline import load_corpus
    from dsjax.data.stored import load_stored
    from dsjax.data.tokenizer import Tokenizer, bytes_tokenizer

    changes = {name: options[name] for name in ("packing", "fim_rate") if options[name] is not None}
    if len(what) == 1 and (Path(what[0]) / "config.json").exists():
        run = load(Path(what[0]) / "config.json")
        seq_len, seed = options["seq_len"] or run.seq_len, run.seed if options["seed"] is None else options["seed"]
        corpus = load_corpus(run.data, run.model.vocab_size, Path(what[0]), seed=run.seed, progress=False, make=False)
        return corpus, replace(run.data, **changes), seq_len, seed
    config = DataConfig(sources=what, text_field=options["text_field"], on_error=options["on_error"], **changes)
    seq_len, seed = options["seq_len"] or 4096, options["seed"] or 0
    corpus = load_stored(config, None, None)
    if corpus is None:
        name = options["tokenizer"]
        tokenizer = bytes_tokenizer() if name == "bytes" else Tokenizer.load(Path(name))
        corpus = show.sample_text(config, tokenizer)
    return corpus, config, seq_len, seed


def _print_manifest(place, manifest) -> None:
    train, heldout = (manifest.total(part) for part in ("train", "heldout"))
    rows = [("folder", str(place)), ("sources", ", ".join(manifest.sources))]
    for label, part, shards in (("training", train, manifest.train), ("held out", heldout, manifest.heldout)):
        size = human(sum(s.size for s in shards))
        counts = f"{part['tokens']:,} tokens, {part['documents']:,} documents, {part['bytes']:,} bytes of text"
        rows.append((label, f"{counts}; {len(shards):,} shards of {size} bytes in all"))
    kind = manifest.tokenizer
    ratio = f"{train['bytes'] / train['tokens']:.2f} bytes a token"
    rows.append(("tokenizer", f"{kind['kind']}, {kind['vocab_size']:,} tokens, {ratio}, sha256 {kind['sha256'][:12]}"))
    split = f", seed {manifest.seed}" if manifest.split_rate else ""
    rows.append(("split", f"{manifest.split_rate:g} of the tokens of punctuation with line breaks{split}"))
    rows.append(
        ("to beat", f"gzip -9 {manifest.gzip_bpb:.3f} bits a byte, xz -9 {manifest.xz_bpb:.3f}, on held-out text")
    )
    rows.append(("sha256", manifest.digest))
    if manifest.skipped:
        rows.append(("skipped", ", ".join(f"{n:,} {reason}" for reason, n in manifest.skipped.items())))
    print_table(None, rows)


def _verify(what: tuple[str, ...]) -> None:
    from tqdm import tqdm

    from dsjax.data.manifest import load_manifest, stored_sources, verify

    run = Path(what[0]) / "config.json"
    found = stored_sources(load(run).data.sources if run.exists() else what)
    if found is None:
        raise ConfigError(f"--verify: expected a folder of shards, and {', '.join(what)} is text")
    wrong, total = [], 0
    for place, _ in found:
        manifest = load_manifest(place)
        _print_manifest(place, manifest)
        total += len(manifest.train) + len(manifest.heldout)
        wrong += verify(place, manifest, lambda shards: tqdm(shards, desc="Verify", disable=None))
    if wrong:
        raise ConfigError(f"{len(wrong)} of {total} shards are damaged: {'; '.join(wrong)}; copy or build them again")
    click.echo(f"{total} shards are as their manifest says")


class Printer:
    """Prints parts of documents: in colours on a terminal, with marks elsewhere."""

    def __init__(self, chars: int):
        from rich.console import Console

        self.console, self.chars = Console(highlight=False, soft_wrap=True), chars

    def rule(self, text: str, line: str = "=") -> None:
        self.console.print(f"{line * 3} {text} {line * 3}", style="bold", markup=False)

    def parts(self, parts) -> None:
        from rich.text import Text

        whole = Text()
        for kind, text in parts:
            if len(text) > self.chars:
                half = self.chars // 2
                text = f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[len(text) - half :]}"
            text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
            if not self.console.is_terminal and kind not in ("text", "special"):
                text = f"[{kind}:]{text}[:{kind}]"
            whole.append(text, style=STYLES.get(kind))
        self.console.print(whole)
