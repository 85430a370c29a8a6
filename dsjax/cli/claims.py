"""`dsjax claims`."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from dsjax.cli.find import find_config
from dsjax.cli.output import note, print_table
from dsjax.cli.verb import POSITIVE, PROBABILITY, Dsjax
from dsjax.config import override


@click.group(
    cls=Dsjax,
    short_help="Test what the papers say, here.",
    epilog="""\b
Example:
  dsjax claims fp8""",
)
def claims():
    """Test a claim of the papers on a model that this machine can train; exit code 1 where it does not hold."""


@claims.command(
    "fp8",
    fields=True,
    short_help="FP8 training loses nothing.",
    options_metavar="[--seeds N] [--out FOLDER] [--json] [--FIELD=VALUE]...",
    epilog="""\b
Examples:
  dsjax claims fp8
  dsjax claims fp8 small --steps 2000 --seeds 5""",
)
@click.argument("preset", required=False)
@click.option("--seeds", type=POSITIVE, default=3, show_default=True, help="Trainings of each recipe.")
@click.option("--out", metavar="FOLDER", help="Runs, claim.json and claim.png.  [default: runs/claims-fp8-PRESET]")
@click.option("--json", "as_json", is_flag=True, help="The result as JSON.")
def claims_fp8(preset: str | None, seeds: int, out: str | None, as_json: bool, changes: dict[str, str]):
    """Train PRESET in bf16, in FP8 with DeepSeek's tiles and as three controls, from the same seeds, and compare.

    Without PRESET: `tiny`, twice as wide and at an eighth of its learning rate, for 200 steps, about an hour on two
    cores.

    The claim holds if the loss over the last 10% of the steps, mean of the seeds, is within 0.25% of bf16's. A stopped
    command goes on where it was.
    """
    from dsjax.claims import fp8

    config = fp8.small_model(find_config("tiny")[0]) if preset is None else find_config(preset)[0]
    config = override(config, changes)
    folder = Path(out) if out is not None else Path("runs") / f"claims-fp8-{config.name}"
    result = fp8.test(config, folder, seeds, note)
    _answer(result, fp8.table(result), folder, as_json)
    if not result["holds"]:
        sys.exit(1)


@claims.command(
    "long_context",
    fields=True,
    short_help="YaRN and a short phase extend the context.",
    options_metavar="[--phase-steps N] [--trials N] [--out FOLDER] [--json] [--FIELD=VALUE]...",
    epilog="""\b
Examples:
  dsjax claims long_context
  dsjax claims long_context --phase-steps 600 --trials 40""",
)
@click.option("--phase-steps", type=POSITIVE, default=400, show_default=True, help="Steps at 2,048 positions.")
@click.option("--trials", type=POSITIVE, default=20, show_default=True, help="Needles of each length and depth.")
@click.option("--out", metavar="FOLDER", help="Runs, claim.json and claim.png.  [default: runs/claims-long_context]")
@click.option("--json", "as_json", is_flag=True, help="The result as JSON.")
def claims_long_context(phase_steps: int, trials: int, out: str | None, as_json: bool, changes: dict[str, str]):
    """Train a small model at 256 positions, extend it to 2,048 with YaRN, and look for needles before and after.

    The claim holds if the extended model finds 90% of the needles' tokens at 2,048, and the one before does not. A
    stopped command goes on where it was.
    """
    from dsjax.claims import long_context

    config = override(long_context.small_model(), changes)
    folder = Path(out) if out is not None else Path("runs") / "claims-long_context"
    result = long_context.test(config, phase_steps, trials, folder, note)
    _answer(result, long_context.table(result), folder, as_json)
    if not result["learned"]:
        note("the model has not learned to look up at its own length, so nothing was tested; try another --seed")
    if not result["holds"]:
        sys.exit(1)


@claims.command(
    "r1_zero",
    fields=True,
    short_help="Rewards alone find long answers.",
    options_metavar="[--seeds N] [--rl-steps N] [--out FOLDER] [--json] [--FIELD=VALUE]...",
    epilog="""\b
Examples:
  dsjax claims r1_zero
  dsjax claims r1_zero --seed 3 --out runs/other-seeds""",
)
@click.option("--seeds", type=POSITIVE, default=3, show_default=True, help="Models, each with its controls.")
@click.option("--rl-steps", type=POSITIVE, default=60, show_default=True, help="Steps of GRPO.")
@click.option("--out", metavar="FOLDER", help="Runs, claim.json and claim.png.  [default: runs/claims-r1_zero]")
@click.option("--json", "as_json", is_flag=True, help="The result as JSON.")
def claims_r1_zero(seeds: int, rl_steps: int, out: str | None, as_json: bool, changes: dict[str, str]):
    """Pre-train small models on many short answers and few chains of thought, and train them by GRPO on outcomes.

    The question is the parity of 24 bits. The claim holds if greedy accuracy on held-out bits goes from chance to 95%
    in two thirds of the seeds, with longer answers, and stays at chance with as much more pre-training, with rewards
    dealt out at random, and from a base that never saw a chain. A stopped command goes on where it was.
    """
    from dsjax.claims import r1_zero
    from dsjax.train.programs import keep_programs

    keep_programs()
    config = override(r1_zero.base_model(), changes)
    folder = Path(out) if out is not None else Path("runs") / "claims-r1_zero"
    result = r1_zero.test(config, seeds, rl_steps, folder, note)
    _answer(result, r1_zero.table(result), folder, as_json)
    if not result["holds"]:
        sys.exit(1)


@claims.command(
    "r1_pipeline",
    fields=True,
    short_help="R1's pipeline, stage by stage.",
    options_metavar="[--rl-steps N] [--out FOLDER] [--json] [--FIELD=VALUE]...",
    epilog="""\b
Examples:
  dsjax claims r1_pipeline
  dsjax claims r1_pipeline --seed=1 --out runs/pipeline-1""",
)
@click.option("--rl-steps", type=POSITIVE, default=30, show_default=True, help="Steps of each stage of RL.")
@click.option("--out", metavar="FOLDER", help="Runs, claim.json and claim.png.  [default: runs/claims-r1_pipeline]")
@click.option("--json", "as_json", is_flag=True, help="The result as JSON.")
def claims_r1_pipeline(rl_steps: int, out: str | None, as_json: bool, changes: dict[str, str]):
    """Pre-train a small model and take it through DeepSeek-R1's stages: cold start, RL on reasoning with the language
    reward and, beside it, without, rejection sampling, fine-tuning of the base on that, RL on everything.

    The claim holds if accuracy on held-out problems goes from chance to 95%, the reasoning into one language where that
    is rewarded, and the model can still do the general task. A stopped command goes on where it was.
    """
    from dsjax.claims import r1_pipeline

    config = override(r1_pipeline.base_model(), changes)
    folder = Path(out) if out is not None else Path("runs") / "claims-r1_pipeline"
    result = r1_pipeline.test(config, rl_steps, folder, note)
    _answer(result, r1_pipeline.table(result), folder, as_json)
    if not result["learned"]:
        note("the base has not learned the general task, so nothing was tested; try another --seed")
    if not result["holds"]:
        note("not found: " + ", ".join(name for name, found in result["found"].items() if not found))
        sys.exit(1)


@claims.command(
    "distillation",
    short_help="A larger model's answers teach more than rewards.",
    options_metavar="[--seeds N] [--chains P] [--out FOLDER] [--json]",
    epilog="""\b
Examples:
  dsjax claims distillation
  dsjax claims distillation --seeds 1 --chains 0.1 --out runs/many-chains""",
)
@click.option("--seeds", type=POSITIVE, default=3, show_default=True, help="Students.")
@click.option("--chains", type=PROBABILITY, default=0.02, show_default=True, help="Of a student's documents, with one.")
@click.option("--out", metavar="FOLDER", help="Runs, claim.json and claim.png.  [default: runs/claims-distillation]")
@click.option("--json", "as_json", is_flag=True, help="The result as JSON.")
def claims_distillation(seeds: int, chains: float, out: str | None, as_json: bool):
    """Teach small models by the answers of a larger one that reasons, and leave them to reinforcement learning for as
    much compute, on the parity of 24 bits.

    The teacher is pre-trained with a chain of thought in a tenth of its documents and then by rewards. The claim holds
    if in two seeds of three the taught model is 10 points of accuracy ahead. About a quarter of an hour on two cores. A
    stopped command goes on where it was.
    """
    from dsjax.claims import distillation
    from dsjax.train.programs import keep_programs

    keep_programs()
    folder = Path(out) if out is not None else Path("runs") / "claims-distillation"
    result = distillation.test(folder, seeds, note, distillation.Sizes(chains=chains))
    _answer(result, distillation.table(result), folder, as_json)
    if not result["holds"]:
        sys.exit(1)


def _answer(result: dict[str, Any], table: tuple[list[str], list[tuple]], folder: Path, as_json: bool) -> None:
    """What a claim has come to: as JSON, or its table and a line."""
    if as_json:
        return click.echo(json.dumps(result, indent=2))
    head, rows = table
    print_table(head, rows, right=range(1, len(head)))
    click.echo(f"\n{result['claim']}: {'holds' if result['holds'] else 'does not hold'} ({folder}/claim.png)")
