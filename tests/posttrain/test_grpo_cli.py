"""`dsjax grpo` as a person types it."""

import json
import shutil
import signal
import time

import jax
import pytest
import runs
import toys
from click.testing import CliRunner

from dsjax import config as configuration
from dsjax.cli import cli
from dsjax.config import ConfigError
from dsjax.hub.convert import export_checkpoint
from dsjax.posttrain import recipes
from dsjax.train import layout
from dsjax.train.lines import read_lines

SMALL = [
    "--task=PROBLEMS", "--style=plain", "--batch-size=16", "--grpo.group-size=8", "--grpo.max-tokens=6",
    "--seq-len=24", "--optimizer.peak-lr=0.03", "--grpo.eval-prompts=1", "--grpo.eval-samples=2", "--eval-every=4",
    "--checkpoint-every=3", "--steps=12", "--grpo.max-rows=16", "--quiet",
]  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return toys.source(tmp_path_factory.mktemp("source") / "micro")


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """Problems of which some are held out. An answer without Latin letters is a good one."""
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    lines = [{"prompt": f"{n}=", "answer": "?", "language": "ru", "rewards": ["language"]} for n in range(300)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--task: missing; expected a .jsonl file of problems, gym:NAME, or parity:BITS"),
        (["--task=parity:8", "--recipe=r1zero"], "--recipe=r1zero: no such recipe; the nearest is r1_zero"),
        (["--task=parity:8", "--grpo.group-size=7"], "grpo.group_size=7: expected a divisor of batch_size=128"),
        (["--task=parity:8", "--grpo.max-tokens=32"], "grpo.max_tokens=32: expected less than seq_len=32"),
        (["--task=parity:8", "--grpo.max-tokens=none"], "grpo.max_tokens=none: expected a whole number"),
        (["--task=parity:8", "--seq-len=many"], "seq_len=many: expected a whole number"),
        (["--task=parity:8", "--grpo.updates=few"], "grpo.updates=few: expected a whole number"),
        (["--task=parity:8", "--grpo.task=parity:9"], "--grpo.task=parity:9: expected --task or that, not both"),
        (["--task=parity:8", "--steps=10", "--grpo.updates=4"], "grpo.updates=4: expected a divisor of steps=10"),
        (["--task=parity:8", "--style=talk"], "grpo.style=talk: expected one of"),
        (["--task=parity:8", "--style=chat"], "runs/micro-grpo: no chat template; looked for"),
        (
            ["--task=parity:8", "--grpo.rewards=style:1"],
            "rewards: style: no such reward; the nearest is language of accuracy",
        ),
        (["--task=parity:8", "--recipe=math"], "seq_len=2048: expected at most model.max_position_embeddings=96"),
        (["--task=parity:8"], "seq_len=32: a prompt of "),
        (["--task=none.jsonl"], "task=none.jsonl: expected a .jsonl file, gym:NAME, or parity:BITS"),
        (["--task=parity:8", "--objective=dapo"], "--objective=dapo: no such option; the nearest is --grpo.objective"),
        (["--task=parity:8", "--run=SOURCE"], "SOURCE: holds a run of another kind; choose another --run"),
    ],
    ids=lambda a: " ".join(a) if isinstance(a, list) else "",
)
def test_what_is_wrong_is_one_line(arguments, message, source, tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "devices", lambda: jax.devices()[:1])
    monkeypatch.chdir(tmp_path)
    arguments = [a.replace("SOURCE", str(source)) for a in arguments]
    result = CliRunner().invoke(cli, ["grpo", str(source), *arguments])
    assert result.exit_code == 2
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"dsjax: {message}".replace("SOURCE", str(source))), result.stderr


def test_a_recipe_that_a_run_does_not_have_is_refused(source, tmp_path):
    run = shutil.copytree(source, tmp_path / "run")
    configuration.save(toys.config(source), run / "config.json")
    settings = ["--optimizer.weight-decay=0", "--optimizer.peak-lr=0.1"]
    result = CliRunner().invoke(cli, ["grpo", str(source), f"--run={run}", "--recipe=r1-1", *settings])
    assert result.exit_code == 2 and result.stderr == (
        "dsjax: --recipe=r1-1: its batch_size is 512, and the run has 16; expected no --recipe, to go on, or another "
        "--run\n"
    )


@pytest.mark.slow
def test_a_hub_folder_becomes_a_run(source, problems, tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "devices", lambda: jax.devices()[:1])
    hub, run = tmp_path / "hub", tmp_path / "run"
    export_checkpoint(source, hub)
    settings = ["--style=plain", "--batch-size=8", "--grpo.group-size=4", "--grpo.max-tokens=4", "--seq-len=32"]
    tried = [
        "grpo",
        str(hub),
        f"--task={problems}",
        f"--run={run}",
        *settings[:-1],
        "--seq-len=5",
        "--optimizer.b1=0.5",
    ]
    result = CliRunner().invoke(cli, tried)
    assert "do not fit" in result.stderr, result.stderr
    for steps in (1, 2):
        asked = ["grpo", str(hub), f"--task={problems}", f"--run={run}", f"--steps={steps}", *settings]
        result = CliRunner().invoke(cli, asked)
        assert result.exit_code == 0, result.stderr
        assert max(row["step"] for row in read_lines(run / "metrics.jsonl") if row["kind"] == "train") == steps
    assert f"resuming {run} at step 1" in result.stderr
    assert configuration.load(run / "config.json").optimizer.b1 == 0.9


def test_a_run_that_came_to_nothing_is_begun_anew_and_one_of_another_model_is_refused(source, problems, tmp_path):
    """A first try with a wrong setting leaves nothing that the second one would go on with."""
    run, base = tmp_path / "run", configuration.load(source / "config.json")
    shutil.copytree(source, tmp_path / "other")

    def dsjax(model, *arguments):
        return CliRunner().invoke(cli, ["grpo", str(model), f"--run={run}", f"--task={problems}", *arguments])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "devices", lambda: jax.devices()[:1])
        assert "do not fit" in dsjax(source, "--grpo.max-tokens=31").stderr
        assert (
            "do not fit"
            in dsjax(source, "--recipe=r1-2", "--style=plain", "--seq-len=33", "--grpo.max-tokens=32").stderr
        )
        assert configuration.load(run / "config.json").grpo.temperature == 0.7
    shutil.copytree(source / "checkpoints", run / "checkpoints", dirs_exist_ok=True)
    result = dsjax(tmp_path / "other")
    assert result.exit_code == 2 and "began with" in result.stderr and "choose another --run" in result.stderr
    assert base.grpo is None


def test_the_help_says_how(monkeypatch):
    result = CliRunner().invoke(cli, ["grpo", "--help"])
    assert result.exit_code == 0
    for text in ("--task", "--recipe", "--style", "--run", "Examples:", "dsjax grpo runs/base --task parity:24"):
        assert text in result.output


def test_the_recipes_are_the_published_ones(source):
    """Reference sections 7.5 and 7.6."""
    base = configuration.load(source / "config.json")
    base = configuration.override(base, {"model.max_position_embeddings": 65_536})
    for name, rate, batch, group, longest, temperature, objective, updates, steps in (
        ("math", 1e-6, 1024, 64, 1024, 1.0, "grpo", 1, 100),
        ("r1-zero", 3e-6, 512, 16, 32_768, 1.0, "r1", 16, 10_400),
        ("r1_1", 3e-6, 512, 16, 32_768, 1.0, "r1", 16, 112),
        ("r1_2", 3e-6, 512, 16, 32_768, 0.7, "r1", 16, 1712),
        ("v3_2", 3e-6, 512, 16, 32_768, 1.0, "v3_2", 16, 112),
    ):
        config = recipes.begin_with(base, name, {"grpo.task": "parity:8"})
        grpo = config.grpo
        assert (config.optimizer.peak_lr, config.batch_size, grpo.group_size) == (rate, batch, group)
        assert (grpo.max_tokens, grpo.temperature, grpo.objective) == (longest, temperature, objective)
        assert (grpo.updates, config.steps) == (updates, steps) and config.steps % updates == 0  # whole rounds
        assert grpo.old_policy == ("trainer" if name == "v3_2" else "sampler")
    assert recipes.begin_with(base, "r1_1", {}).grpo.reference_every == 400
    with pytest.raises(ConfigError, match="nearest is math"):
        recipes.begin_with(base, "maths", {})


# Processes, and real signals.


@pytest.mark.slow
def test_a_killed_process_goes_on_with_the_same_rewards(source, problems, tmp_path):
    env = runs.environment(tmp_path / "compiled")
    options = [a.replace("PROBLEMS", str(problems)) for a in SMALL] + ["--grpo.max-staleness=1"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    result = runs.dsjax("grpo", source, "--run", whole, *options, env=env)
    assert result.returncode == 0, result.stderr
    for number, n_rows in ((signal.SIGKILL, 0), (signal.SIGKILL, 4), (signal.SIGTERM, 7)):
        with runs.started("grpo", source, "--run", killed, *options, env=env) as process:
            while process.poll() is None and len(toys.rows(killed, "train")) < n_rows + 1:
                time.sleep(0.003)
            process.send_signal(number)
            _, said = process.communicate(timeout=300)
            assert process.returncode in (-9, 0), said
    result = runs.dsjax("grpo", killed, "--quiet", env=env)
    assert result.returncode == 0, result.stderr
    assert toys.rows(killed) == toys.rows(whole)
    rewards = [row["reward"] for row in toys.rows(whole, "train")]
    assert len(rewards) == 12 and len(set(rewards)) > 3
