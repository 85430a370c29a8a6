"""`dsjax presets` and `dsjax config`: what can be trained."""

import json
from pathlib import Path

import click

from dsjax.cli.find import find_config
from dsjax.cli.output import as_typed, print_table
from dsjax.cli.verb import PHASE, Verb
from dsjax.config import ConfigError, field_rows, override, show, to_dict
from dsjax.plan import count
from dsjax.plan.count import human

PLOT = "recipe_NAME.png"
LONG = 40  # characters of a value that stand beside its description


@click.command(
    cls=Verb,
    short_help="List the presets and what they cost.",
    epilog="""\b
Examples:
  dsjax presets
  dsjax presets --json""",
)
@click.option("--json", "as_json", is_flag=True, help="Exact numbers as JSON.")
def presets(as_json: bool):
    """List the presets: parameters, layers, experts, cache and FLOPs a token.

    `dsjax config PRESET` prints one whole; a new one is a file in configs/.
    """
    import configs

    rows = [count.summary(configs.load(name)) for name in configs.PRESETS]
    if as_json:
        return click.echo(json.dumps(rows, indent=2))
    body = []
    for row in rows:
        numbers, experts, kept = row["parameters"], row["experts"], row["cache_bytes_per_token"]
        v1 = row["attention"] == "mha"
        body.append(
            (
                row["name"],
                human(numbers["total"]),
                human(numbers["active_body_embed_head" if v1 else "active_body_head"]) + ("*" if v1 else " "),
                human(numbers["mtp"]) if numbers["mtp"] else "-",
                str(row["layers"]["total"]),
                f"{experts['routed']}+{experts['shared']}",
                str(experts["per_token"]),
                human(kept["own"]),
                human(kept["mha"]),
                human(kept["gqa8"]),
                human(row["train_flops_per_token"]["causal"]).replace("B", "G"),
            )
        )
    head = ("", "", "", "", "", "", "", "cache", "as", "as", "train")
    names = ("preset", "total", "active ", "MTP", "layers", "experts", "top", "bytes", "MHA", "GQA-8", "FLOPs")
    print_table([f"{a}\n{b}" for a, b in zip(head, names)], body, right=range(1, 11))
    click.echo(
        "\ntotal   parameters, without those of multi-token prediction (MTP)\n"
        "active  parameters a token uses, the head's included; * the embedding's too, as\n"
        "        the DeepSeekMoE paper counts\n"
        "top     routed experts a token goes to; it passes the shared ones (+) as well\n"
        "cache   bfloat16 bytes a token, beside the same shape with multi-head and with\n"
        "        8-group attention\n"
        "FLOPs   of training, a token: forward and backward, causal, rows of seq_len"
    )


@click.command(
    cls=Verb,
    fields=True,
    short_help="Print every field of a configuration.",
    options_metavar="[--phase NAME] [--json] [--plot [FILE.png]] [--FIELD=VALUE]...",
    epilog="""\b
Examples:
  dsjax config v3
  dsjax config v3 --plot
  dsjax config v3 --phase=32k
  dsjax config tiny --model.n-routed-experts=32 --json > mine.json
  dsjax train mine.json""",
)
@click.argument("source", metavar="NAME")
@PHASE
@click.option("--json", "as_json", is_flag=True, help="JSON that `dsjax train FILE.json` takes.")
@click.option(
    "--plot",
    is_flag=False,
    flag_value=PLOT,
    metavar="[FILE.png]",
    help="Draw learning rate, batch, MTP weight and router-bias speed over the run's tokens.",
)
def config(source: str, phase: str | None, as_json: bool, plot: str | None, changes: dict[str, str]):
    """Print every field of a configuration: its value and what it means.

    NAME is a preset, a run folder or a configuration file (.json). Any field is also an option of `dsjax train`,
    `dsjax eval` and this command: --seed=1, --model.hidden-size=256. A list is separated by commas, an empty optional
    value is `none`.
    """
    whole, _ = find_config(source, phase)
    whole = override(whole, changes)
    if plot:
        from dsjax.train.recipe_picture import draw_recipe  # matplotlib takes a second to import

        if not plot.endswith(".png"):
            raise ConfigError(f"--plot={show(plot)}: expected a file that ends with .png, or nothing for {PLOT}")
        path = Path(plot.replace("NAME", whole.name) if plot == PLOT else plot)
        draw_recipe(whole, path)
        return click.echo(path)
    if as_json:
        return click.echo(json.dumps(to_dict(whole), indent=2))
    sections: dict[str, list] = {}
    for name, value, text in field_rows(whole):
        section, _, field = name.rpartition(".")
        value = as_typed(value)
        if len(value) > LONG:
            value, text = f"{value.count(',') + 1} items", f"{value}: {text}"
        sections.setdefault(section, []).append((f"  {field}", value, text))
    for section, rows in sections.items():
        title = f"{section}: --{section}.FIELD=VALUE" if section else f"{whole.name}: --FIELD=VALUE"
        click.echo(("\n" if section else "") + click.style(title, bold=True))
        print_table(None, rows, widths=(28, 10))
