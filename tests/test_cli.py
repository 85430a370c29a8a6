"""The command line: what it prints, what it calls, and how it refuses."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from click.testing import CliRunner

import configs
from dsjax.cli import cli
from dsjax.cli.output import note
from dsjax.config import ConfigError, field_rows, from_dict, save
from dsjax.plan.count import human


def run(*args: str, input: str | bytes | None = None, columns: int = 80):
    return CliRunner().invoke(cli, args, input=input, prog_name="dsjax", env={"COLUMNS": str(columns)})


def refused(*args: str, input: str | bytes | None = None) -> str:
    """The one line that answers a mistake."""
    result = run(*args, input=input)
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    assert result.stderr.startswith("dsjax: ") and result.stderr.count("\n") == 1
    return result.stderr.removeprefix("dsjax: ").rstrip("\n")


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """runs/tiny with a configuration, in a fresh working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/tiny").mkdir(parents=True)
    save(configs.load("tiny"), tmp_path / "runs/tiny/config.json")
    return "runs/tiny"


@pytest.fixture
def calls(monkeypatch):
    """Stands in for the modules that compute; the list of what they were asked."""
    calls = []

    def stream(run_folder, prompt, **options):
        calls.append((str(run_folder), prompt, options))
        yield from ["1 + ", "1 = ", "2"]

    def train(config, run_folder, *, quiet, explicit, source, sampler, profile, began):
        calls.append((config, str(run_folder), quiet, explicit, *([] if source is None else [str(source)])))

    def evaluate(run_folder, overrides, *, step):
        calls.append((str(run_folder), overrides, step))
        return {"loss": 1.23456, "tokens": 1000}

    import dsjax.infer
    import dsjax.train
    from dsjax.train import programs

    monkeypatch.setattr(programs, "keep_programs", lambda: None)
    for package, name, functions in [
        (dsjax.train, "loop", {"train": train, "evaluate": evaluate}),
        (dsjax.infer, "generate", {"stream": stream, "continue_text": stream}),
    ]:
        module = types.ModuleType(f"{package.__name__}.{name}")
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(package, name, module, raising=False)
    return calls


@pytest.mark.parametrize(
    "command", [[], ["train"], ["generate"], ["presets"], ["config"], ["eval"], ["report"], ["needle"]]
)
def test_help_fits_80_columns_and_shows_an_example(command):
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert max(map(len, result.output.splitlines())) <= 80
    assert "  dsjax " in result.output
    assert "..." not in result.output.replace("[ARGS]...", "").replace("VALUE]...", "")
    assert run(*command, "-h").output == result.output


def test_version():
    assert run("--version").output == "dsjax 0.1.0\n"


def test_no_command_shows_the_help():
    result = run()
    assert result.exit_code == 2
    assert result.output == run("--help").output


@pytest.mark.parametrize("columns", [80, 100])
def test_presets_is_a_table_that_fits(columns):
    lines = run("presets", columns=columns).output.splitlines()
    assert max(map(len, lines)) <= columns
    rows = {line.split()[0]: line.split()[1:] for line in lines[2 : 2 + len(configs.PRESETS)]}
    assert list(rows) == list(configs.PRESETS)
    assert rows["v3"] == ["671.0B", "36.6B", "11.6B", "61", "256+1", "8", "70.3K", "4.00M", "249.9K", "250.5G"]
    assert rows["moe_16b"][1] == "2.83B*"


def test_presets_as_json_is_exact():
    rows = {row["name"]: row for row in json.loads(run("presets", "--json").output)}
    assert list(rows) == list(configs.PRESETS)
    assert rows["v3"]["parameters"]["total"] == 671_026_419_200


@pytest.mark.parametrize("columns", [80, 100])
def test_config_prints_every_field(columns):
    output = run("config", "v3", columns=columns).output
    assert max(map(len, output.splitlines())) <= columns
    shown = [line.split()[0] for line in output.splitlines() if line.startswith("  ") and line[2] != " "]
    assert sorted(shown) == sorted(name.rpartition(".")[2] for name, _, _ in field_rows(configs.load("v3")))
    assert "  peak_lr                     0.00022     highest learning rate" in output


def test_config_draws_its_plan(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for args, name in (
        (["tiny", "--plot"], "recipe_tiny.png"),
        (["--plot", "mine.png", "tiny"], "mine.png"),
        (["--plot", "--steps=5", "tiny"], "recipe_tiny.png"),
        (["moonlight", "--plot=m.png"], "m.png"),
    ):
        assert run("config", *args).output == f"{name}\n"
        assert Path(name).read_bytes().startswith(b"\x89PNG")
        Path(name).unlink()
    message = "--plot=x.jpg: expected a file that ends with .png, or nothing for recipe_NAME.png"
    assert refused("config", "tiny", "--plot=x.jpg") == message


def test_config_shows_phases_whole():
    output = " ".join(run("config", "v3", columns=100).output.split())
    assert "phases 4 items constant:1e+13:1,cosine:1.43e+13:0.1" in output


def test_config_as_json_reads_back():
    output = run("config", "v3", "--json", "--optimizer.peak-lr=1e-3", "--compute.scan-layers", "false").output
    config = from_dict(json.loads(output))
    assert (config.optimizer.peak_lr, config.compute.scan_layers) == (1e-3, False)


def test_config_reads_a_run_folder_and_a_file(run_folder):
    assert run("config", run_folder).output == run("config", "tiny").output
    assert run("config", f"{run_folder}/config.json").output == run("config", "tiny").output


def test_train_calls_the_loop_with_the_overrides(calls, run_folder):
    result = run("train", "--steps", "100", "tiny", "--optimizer.peak-lr=1e-3", "--mesh.fsdp", "-1", "--quiet")
    assert result.exit_code == 0, result.stderr
    config, folder, quiet, explicit = calls[0]
    assert (config.steps, config.optimizer.peak_lr, config.name) == (100, 1e-3, "tiny")
    assert (folder, quiet) == ("runs/tiny", True)
    assert explicit == {"steps": "100", "optimizer.peak_lr": "1e-3", "mesh.fsdp": "-1"}


def test_train_takes_a_folder_a_file_and_a_place_for_the_run(calls, run_folder):
    run("train", "v2-lite")
    run("train", run_folder)
    run("train", "runs/tiny/config.json", "--run", "elsewhere")
    assert [(config.name, folder) for config, folder, _, _ in calls] == [
        ("v2_lite", "runs/v2_lite"),
        ("tiny", "runs/tiny"),
        ("tiny", "elsewhere"),
    ]


def test_a_phase_goes_on_from_the_run_before_it(calls, run_folder):
    for name in ("v3", "v3-32k"):
        os.makedirs(f"runs/{name}")
        save(configs.load("tiny"), f"runs/{name}/config.json")
    run("train", "v3", "--phase", "pretrain")
    run("train", "v3", "--phase=32k", "--mesh.context=8")
    run("train", "v3", "--phase=128k", "--from", "runs/tiny", "--run=long")
    os.makedirs("runs/v3-128k/checkpoints")
    run("train", "v3", "--phase=128k")
    assert [(call[0].name, call[0].seq_len, call[1], *call[4:]) for call in calls] == [
        ("v3", 4096, "runs/v3"),
        ("v3-32k", 32768, "runs/v3-32k", "runs/v3"),
        ("v3-128k", 131072, "long", "runs/tiny"),
        ("v3-128k", 131072, "runs/v3-128k"),
    ]
    assert json.loads(run("config", "v3", "--phase=32k", "--json").output)["batch_size"] == 1920


def test_generate_streams_the_text_and_nothing_else(calls, run_folder):
    result = run("generate", run_folder, "--prompt", "-- 1+1", "--temperature=0", "--checkpoint", "40")
    assert (result.stdout, result.stderr, result.exit_code) == ("1 + 1 = 2", "", 0)
    options = {
        "temperature": 0,
        "top_p": 0.95,
        "max_tokens": 200,
        "seed": 0,
        "dtype": None,
        "step": 40,
        "chat": False,
        "system": None,
    }
    assert calls == [("runs/tiny", "-- 1+1", options | {"say": note})]


@pytest.mark.parametrize("args", [(), ("--prompt", "-"), ("--prompt=-",)])
def test_generate_reads_standard_input_without_its_last_line_break(calls, run_folder, args):
    run("generate", run_folder, *args, input="déf \n\n".encode())
    assert calls[0][1] == "déf \n"


def test_eval_prints_a_table_or_json(calls, run_folder):
    assert run("eval", run_folder).output.split() == ["loss", "1.2346", "tokens", "1000"]
    result = run("eval", run_folder, "--data.sources=x.txt", "--checkpoint=3", "--json")
    assert json.loads(result.output) == {"loss": 1.23456, "tokens": 1000}
    assert calls[1] == ("runs/tiny", {"data.sources": "x.txt"}, 3)


def test_eval_asks_problems(calls, run_folder, monkeypatch):
    import dsjax.posttrain.evaluate

    def evaluate(loaded, task, problems, asking, *, label, out, max_rows, best_by, **_):
        calls.append((loaded, task.name, len(problems), asking, label, out, max_rows, best_by))
        return {"pass@1": 0.5}

    monkeypatch.setattr(dsjax.posttrain.evaluate, "evaluate", evaluate)
    monkeypatch.setattr(
        sys.modules["dsjax.cli.evaluate"], "_load", lambda folder, checkpoint, given: ("model", checkpoint)
    )
    asking = dsjax.posttrain.evaluate.Asking
    assert run("eval", run_folder, "--task=parity:24").output.split() == ["pass@1", "0.5000"]
    assert calls == [("model", "parity:24", 256, asking(), "runs/tiny", None, 8, "logprob")]
    options = "--limit=3 --samples=2 --temperature=0.5 --top-p=1 --max-tokens=9 --seed=0 --best-by=reward --max-rows=2"
    more = ["--out=x.jsonl", "--checkpoint=3", "--json", "--style=r1_zero"]
    assert json.loads(run("eval", run_folder, "--task=parity:24", *options.split(), *more).output) == {"pass@1": 0.5}
    asked = asking(2, 0.5, 1.0, 9, 0, "r1_zero")
    assert calls[1] == ("model", "parity:24", 3, asked, "runs/tiny, step 3", Path("x.jsonl"), 2, "reward")
    run("eval", run_folder, "--task=parity:24", "--temperature=0")
    assert calls[2][3] == asking(samples=1, temperature=0)


def test_a_file_of_problems_is_asked_whole_or_as_training_holds_it_out(calls, run_folder, monkeypatch):
    import dsjax.posttrain.evaluate

    Path("x.jsonl").write_text("".join(json.dumps({"prompt": str(n), "answer": "B"}) + "\n" for n in range(200)))
    monkeypatch.setattr(dsjax.posttrain.evaluate, "evaluate", lambda _, task, problems, *a, **b: {"n": len(problems)})
    monkeypatch.setattr(sys.modules["dsjax.cli.evaluate"], "_load", lambda *_: (None, None))
    options = ["eval", run_folder, "--task=x.jsonl", "--rewards=choice"]
    assert run(*options).output.split() == ["n", "200"]
    assert 0 < int(run(*options, "--heldout").output.split()[1]) < 30


def test_eval_takes_a_seed_of_the_configuration_as_before(calls, run_folder):
    run("eval", run_folder, "--seed=0")
    assert calls == [("runs/tiny", {"seed": "0"}, None)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trian tiny", "trian: no such command; the nearest is train"),
        ("--jsn", "--jsn: no such option; the nearest is "),
        ("train", "PRESET: missing; see `dsjax train --help`"),
        ("train tinny", "tinny: no such preset; the nearest is tiny"),
        ("train tiny extra", "got unexpected extra argument (extra); see `dsjax train --help`"),
        ("train tiny --stepz 5", "--stepz: no such option; the nearest is --steps"),
        ("train tiny --quite", "--quite: no such option; the nearest is --quiet"),
        (
            "train tiny --optimizer.peek-lr=1",
            "--optimizer.peek-lr=1: no such option; the nearest is --optimizer.peak-lr",
        ),
        ("train tiny --peak_lr=1", "--peak_lr=1: no such option; the nearest is --optimizer.peak-lr"),
        ("train tiny --mesh.expert=two", "mesh.expert=two: expected a whole number"),
        ("train tiny --compute.remat=ful", "compute.remat=ful: expected one of none, full, deepseek"),
        ("train tiny --model=3", "model=3: expected its fields one by one, such as model.vocab_size"),
        ("train tiny --steps", "--steps: missing value; expected a whole number greater than 0"),
        ("train tiny --steps --quiet", "--steps: missing value; expected a whole number greater than 0"),
        ("train tiny --run", "--run: missing value; expected a path"),
        ("train tiny --steps 5 --steps=6", "--steps=6: given twice, first as 5"),
        ("train tiny --batch-size=4 --batch_size=4", "--batch_size=4: given twice, first as 4"),
        ("train tiny --run a --run b", "--run=b: given twice, first as a"),
        ("train tiny --quiet=yes", "--quiet=yes: takes no value; expected --quiet alone"),
        ("train tiny -x", "-x: no such option; the nearest is -h"),
        ("train runs/tinny", "runs/tinny: no such run folder; the nearest is runs/tiny"),
        (
            "train tiny --run runs/tiny/config.json",
            "--run=runs/tiny/config.json: expected a folder, and this is a file",
        ),
        ("config runs", "runs: expected a preset or a run folder, and this folder has no config.json"),
        ("config no.json", "no.json: No such file or directory"),
        ("generate tiny", "tiny: no such run folder; the nearest is runs/tiny"),
        ("generate runs/tiny --promt x", "--promt: no such option; the nearest is --prompt"),
        ("generate runs/tiny --steps=3", "--steps=3: no such option; the nearest is "),
        ("generate runs/tiny --temperature=hot", "--temperature=hot: expected a number at least 0"),
        ("generate runs/tiny --temperature nan", "--temperature=nan: expected a number at least 0"),
        ("generate runs/tiny --top-p 0", "--top-p=0: expected a number greater than 0 and at most 1"),
        ("generate runs/tiny --max-tokens=1.5", "--max-tokens=1.5: expected a whole number greater than 0"),
        ("generate runs/tiny --seed -1", "--seed=-1: expected a whole number at least 0"),
        ("train v3 --phase=64k", "--phase=64k: no phase of v3; it has pretrain, 32k, 128k"),
        ("train v3 --phase=32k", "--phase=32k: goes on from runs/v3, and there is no run; --from=RUN names another"),
        ("train tiny --phase=32k", "--phase: no phases of tiny were published; v2 and v3 have them"),
        ("train runs/tiny --phase=32k", "--phase=32k: expected a preset before it, and runs/tiny is none"),
        ("train tiny --from runs/tiny", "--from=runs/tiny: expected --run=PATH with it, the folder of the new run"),
        ("train tiny --from runs/tinny --run x", "runs/tinny: no such run folder; the nearest is runs/tiny"),
        ("config moonlight --phase=32k", "--phase: no phases of moonlight were published"),
        ("needle runs/tinny", "runs/tinny: no such run folder; the nearest is runs/tiny"),
        ("needle runs/tiny --lengths 64,x", "--lengths=64,x: expected whole numbers greater than 1"),
        ("needle runs/tiny --depths 0,2", "--depths=0,2: expected numbers from 0 to 1, separated by commas"),
        ("needle runs/tiny --trials 0", "--trials=0: expected a whole number greater than 0"),
        ("needle runs/tiny --text none.txt", "none.txt: No such file or directory"),
        ("eval runs", "runs: expected a run folder, and this folder has no config.json"),
        ("eval runs/tiny --data.source=x", "--data.source=x: no such option; the nearest is --data.sources"),
        ("eval runs/tiny --samples=3", "--samples=3: expected with --task"),
        ("eval runs/tiny --task=parity:8 --tasks=x", "--tasks=x: expected without --task"),
        ("eval runs/tiny --task=parity:8 --steps=7", "--steps=7: expected with neither --task nor --tasks"),
        ("eval runs/tiny --task=parity:8 --devices=4", "--devices=4: expected with neither --task nor --tasks"),
        (
            "eval runs/tiny --task=parity:8 --out=no/x.jsonl",
            "--out=no/x.jsonl: expected a file in a folder that is there",
        ),
        (f"eval runs/tiny --task={'x' * 5000}", "task=xxxx"),
        ("eval runs/tiny --task=parity:8 --include-path=x", "--include-path=x: expected with --tasks"),
        ("eval runs/tiny --tasks=x --rewards=gym", "--rewards=gym: expected with --task"),
        ("eval runs/tiny --task=parity:8 --heldout", "--heldout: expected with a file; parity:8 has held-out problems"),
        ("eval runs/tiny --task=x.jsonl", "task=x.jsonl: expected a .jsonl file, gym:NAME, or parity:BITS"),
        ("eval runs/tiny --task=parity:8 --out=.", "--out=.: expected a file"),
        ("presets x", "got unexpected extra argument (x); see `dsjax presets --help`"),
    ],
)
def test_a_mistake_is_answered_by_one_line(run_folder, calls, line, message):
    assert refused(*line.split()).startswith(message)
    assert not calls


def test_a_prompt_that_is_no_text_is_refused(run_folder, calls):
    assert refused("generate", run_folder, input=b"ab\xff") == "standard input: not UTF-8 at byte 2"


def test_errors_from_below_are_one_line_too(run_folder, calls, monkeypatch):
    from dsjax.train import loop

    def fail(error):
        def train(*args, **kwargs):
            raise error

        monkeypatch.setattr(loop, "train", train)

    fail(ConfigError("data.sources=x.txt:\nno such file"))
    assert refused("train", "tiny") == "data.sources=x.txt: no such file"
    fail(PermissionError(13, "Permission denied", "runs/tiny"))
    assert refused("train", "tiny") == "runs/tiny: Permission denied"
    fail(OSError(28, "No space left on device"))
    assert refused("train", "tiny") == "disk: No space left on device"
    fail(KeyboardInterrupt())
    result = run("train", "tiny")
    assert (result.exit_code, result.output.strip()) == (130, "")
    fail(RuntimeError("a bug"))
    assert isinstance(run("train", "tiny").exception, RuntimeError)  # a bug keeps its traceback


def test_human_numbers():
    assert [human(n) for n in (0, 640, 2560, 16_400, 671_026_419_200, 1_026_408_232_448)] == [
        "0", "640", "2.56K", "16.4K", "671.0B", "1.03T",
    ]  # fmt: skip


MAIN = [sys.executable, "-c", "import sys; from dsjax.cli import main; main()"]


def test_the_process_exits_with_2_and_no_traceback():
    result = subprocess.run([*MAIN, "train", "tinny"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "dsjax: tinny: no such preset; the nearest is tiny\n"


def test_a_closed_pipe_ends_quietly():
    process = subprocess.Popen([*MAIN, "presets"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 1


def test_listing_needs_no_jax():
    program = """
import sys
from dsjax.cli import cli
for args in (["--help"], ["train", "--help"], ["config", "v3"], ["presets"]):
    try:
        cli.main(args, prog_name="dsjax")
    except SystemExit as end:
        assert end.code == 0
assert "jax" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL, env=os.environ)


def test_devices_are_of_the_launch(calls, run_folder):
    assert run("train", "tiny", "--devices=8", "--mesh.expert", "4").exit_code == 0
    config, _, _, explicit = calls[-1]
    assert config.distributed.devices == 8 and explicit == {"mesh.expert": "4", "distributed.devices": "8"}
    assert run("eval", run_folder, "--devices", "2").exit_code == 0
    assert calls[-1][1] == {"distributed.devices": "2"}
    assert refused("train", "tiny", "--devices=none") == "--devices=none: expected a whole number greater than 0"
