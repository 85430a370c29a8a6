"""`dsjax distill`."""

import time
from pathlib import Path

import click

from dsjax.cli.find import find_model, with_devices
from dsjax.cli.output import note
from dsjax.cli.posttrain import EPOCHS
from dsjax.cli.verb import DEVICES, NATURAL, POSITIVE, PROBABILITY, TEMPERATURE, Verb
from dsjax.config import DTYPES, ConfigError, EngineConfig, show

BEGAN = time.time()  # of the program, for the ledger of its time


@click.command(
    cls=Verb,
    fields=True,
    short_help="Teach a model another one's answers.",
    options_metavar="--prompts TASK [--run PATH] [OPTIONS] [--FIELD=VALUE]...",
    epilog="""\b
Examples:
  dsjax distill runs/base-grpo runs/small --prompts parity:24 --style plain --max-tokens 32
  dsjax distill deepseek-ai/DeepSeek-R1 runs/small --prompts problems.jsonl --samples 8 --recipe distill-qwen-7b
  dsjax distill runs/large runs/small --prompts gym:chain_sum --logits 16 --logits-weight 0.8

Any field of the configuration is an option, for the student's training: `dsjax config RUN` lists them.""",
)
@click.argument("teacher")
@click.argument("student")
@click.option("--prompts", metavar="TASK", help="Problems: a .jsonl file, gym:NAME, or parity:BITS.")
@click.option("--problems", type=POSITIVE, metavar="N", default=1000, show_default=True, help="How many of them.")
@click.option("--run", "run", metavar="PATH", help="Run folder; one that exists goes on.  [default: runs/NAME-distill]")
@click.option("--samples", type=POSITIVE, default=4, show_default=True, help="Answers a problem.")
@click.option(
    "--keep", type=click.Choice(["right", "all"]), default="right", show_default=True, help="Answers to learn."
)
@click.option("--most", type=POSITIVE, metavar="N", help="Answers a problem that are kept.  [default: all]")
@click.option("--rewards", metavar="NAME:W,NAME:W", help="What judges them.  [default: the task's]")
@click.option("--temperature", type=TEMPERATURE, default=1.0, show_default=True, help="Of the teacher.")
@click.option("--top-p", type=PROBABILITY, default=1.0, show_default=True, help="Sample from this much probability.")
@click.option("--max-tokens", type=POSITIVE, default=2048, show_default=True, help="Longest answer that is sampled.")
@click.option("--longest", type=POSITIVE, metavar="N", help="Longest answer that is kept.")
@click.option("--language", type=PROBABILITY, metavar="P", help="Least share of words in one language.  [default: any]")
@click.option(
    "--style",
    type=click.Choice(["plain", "r1_zero", "chat"]),
    help="How a problem is put.  [default: chat if the teacher has a template, else plain]",
)
@click.option("--sample-seed", type=NATURAL, default=0, show_default=True, help="Of the answers.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Of the teacher.  [default: its run's; bfloat16 from the Hub]")
@click.option("--max-rows", type=POSITIVE, default=EngineConfig.max_rows, show_default=True, help="Answers at once.")
@click.option("--logits", type=POSITIVE, metavar="K", help="Learn the teacher's K likeliest tokens of every place too.")
@click.option("--logits-weight", type=PROBABILITY, metavar="W", help="Of the loss that is to them.  [default: 0.5]")
@click.option("--recipe", metavar="NAME", help="Published settings: distill, distill_*, and sft's.  [default: distill]")
@click.option("--epochs", type=EPOCHS, metavar="N", help="Passes over the answers.  [default: the recipe's, 2]")
@DEVICES
@click.option("--quiet", is_flag=True, help="One line a step interval and no bar, for logs.")
def distill(teacher, student, prompts, problems, run, rewards, style, logits, logits_weight, devices, changes, **given):
    """Ask TEACHER problems, keep its right answers, and fine-tune STUDENT on them, as DeepSeek-R1's small models were.

    Both are run folders, Hub folders or Hub names. The run folder gets traces/ and student/, which is a run of
    `dsjax sft`: `dsjax generate PATH/student`. The same command goes on where it was.
    """
    changes = with_devices(changes, devices)
    if prompts is None:
        raise ConfigError("--prompts: missing; expected a .jsonl file of problems, gym:NAME, or parity:BITS")
    if logits_weight is not None and logits is None:
        raise ConfigError(f"--logits-weight={show(logits_weight)}: expected with --logits")
    folders = find_model(teacher), find_model(student)
    name = Path(student).name.partition("@")[0] if not Path(student).is_dir() else folders[1].absolute().name
    run_folder = Path(run or f"runs/{name}-distill")
    if run_folder.exists() and not run_folder.is_dir():
        raise ConfigError(f"--run={show(str(run_folder))}: expected a folder, and this is a file")
    from dsjax.hub.chat import has_template
    from dsjax.infer.generate import continue_text
    from dsjax.posttrain.distill import Traces
    from dsjax.posttrain.distill import distill as run_stages
    from dsjax.posttrain.tasks import open_task
    from dsjax.train.programs import keep_programs

    keep_programs()
    asked = {name: given.pop(name) for name in ("samples", "keep", "most", "temperature", "top_p", "max_tokens")}
    asked |= {"longest": given.pop("longest"), "language": given.pop("language") or 0.0}
    asked |= {"seed": given.pop("sample_seed"), "style": style or ("chat" if has_template(folders[0]) else "plain")}
    weight = {} if logits_weight is None else {"logits_weight": logits_weight}
    with open_task(prompts, weights=rewards) as task:
        run_stages(
            *folders,
            task,
            run_folder,
            Traces(**asked),
            n_problems=problems,
            logits=logits or 0,
            changes=changes,
            say=note,
            sampler=continue_text,
            began=BEGAN,
            **weight,
            **given,
        )
