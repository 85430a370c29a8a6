"""`dsjax plan` by arithmetic: legal meshes, numbers with their basis, files, and errors of one line."""

import json
import math

import pytest
import yaml
from click.testing import CliRunner

import configs
from dsjax import cli
from dsjax.config import ConfigError, MeshConfig, override, replace
from dsjax.plan import chips, compile, count, job, report, roofline
from dsjax.plan.search import legal_meshes, search


def run(*args):
    """(exit code, what the command printed) of `dsjax plan ...` without libtpu."""
    result = CliRunner().invoke(cli.cli, ["plan", *args, "--no-compile"])
    return result.exit_code, result.output


def v3(batch=2048, **changes):
    return job.planned(configs.load("v3"), changes, batch, 4096)


def test_every_number_says_where_it_comes_from():
    config = job.on_slice(v3(), chips.parse("v5p:8x8x8"))
    rows = report.rows(config, chips.parse("v5p:8x8x8"), None, price=4.2)
    assert {row.basis for row in rows} == {"computed", "published", "assumed"}
    found = {(row.section, row.name): row.value for row in rows}
    memory = [found["HBM a chip", name] for name in report.CATEGORIES]
    assert found["HBM a chip", "all"] == pytest.approx(sum(memory))
    numbers = count.parameters(config.model)
    assert found["HBM a chip", "parameters"] == pytest.approx(4 * (numbers.total + numbers.mtp) / 512)
    assert found["HBM a chip", "optimizer"] == pytest.approx(found["HBM a chip", "parameters"])  # two in bf16
    assert found["run", "cost"] == pytest.approx(4.2 * found["run", "chip-hours"])
    assert found["run", "chip-hours"] == pytest.approx(24 * 512 * found["run", "days for 14.8T tokens"])
    assert found["time", "roofline"] <= found["time", "predicted step"]
    speed = found["speed", "tokens/s/chip"]
    assert speed == pytest.approx(found["speed", "tokens a step"] / found["time", "predicted step"] / 512)


def test_fully_sharded_weights_are_gathered_each_pass_and_their_gradients_scattered_once():
    config = replace(v3(), compute=replace(configs.load("v3").compute, remat="full"))
    sizes = vars(job.on_slice(config, chips.parse("v5p:8x8x8")).mesh)
    numbers = count.parameters(config.model)
    weights = numbers.total + numbers.mtp
    assert roofline.estimate(config, sizes).sent == {"fsdp": pytest.approx(511 / 512 * weights * (3 * 2 + 4))}


def test_experts_on_devices_of_their_own_are_gathered_less_and_their_tokens_travel():
    config = v3()
    few, many = (roofline.estimate(config, vars(MeshConfig(fsdp=f, expert=512 // f))) for f in (64, 512))
    assert few.memory["parameters"] == pytest.approx(many.memory["parameters"])
    assert few.memory["temporary"] < many.memory["temporary"]
    assert few.sent["fsdp"] < many.sent["fsdp"]
    assert "expert" in few.sent and "expert" not in many.sent
    assert few.model_flops == many.model_flops


def test_slices_send_over_the_data_centres_network():
    config = override(v3(4096), {"mesh.data": "2"})
    topology = chips.parse("v5p:8x8x8")
    config = job.on_slice(config, topology, 2)
    sizes = vars(config.mesh)
    needs = roofline.estimate(config, sizes)
    times = roofline.times(needs, topology, sizes, 2)
    assert times.network["data"] == pytest.approx(needs.sent["data"] / topology.chip.dcn_bandwidth)


def test_legal_meshes_divide_everything_and_multiply_to_the_devices():
    config = job.planned(configs.load("tiny"), {}, 32, 256)
    meshes = [vars(mesh) for mesh in legal_meshes(config, 16)]
    assert all(math.prod(sizes.values()) == 16 for sizes in meshes)
    assert {"data": 1, "fsdp": 16, "expert": 1, "context": 1, "tensor": 1, "stage": 1} in meshes
    assert not any(sizes["tensor"] > 4 for sizes in meshes)  # 4 heads
    assert len({tuple(sizes.values()) for sizes in meshes}) == len(meshes) > 20


def test_the_search_puts_what_fits_first_and_the_fastest_of_it():
    config, topology = v3(**{"compute.remat": "full"}), chips.parse("v5p:8x8x8")
    found = search(config, topology)
    fits = [c.hbm <= topology.chip.hbm_bytes for c in found]
    assert fits == sorted(fits, reverse=True)
    times = [c.step_s for c, fit in zip(found, fits) if fit]
    assert times and times == sorted(times)


def test_the_command_prints_saves_and_writes_launch_files(tmp_path):
    out = tmp_path / "plan"
    code, said = run("tiny", "--topology=v5e:2x4", "--batch=16", "--mesh.expert=2", "--tokens=1B", f"--out={out}")
    assert code == 0, said
    assert "tiny on v5e:2x4: 8 chips, fsdp=4 expert=2" in said and "days for 1.00B tokens" in said
    plan = json.loads((out / "plan.json").read_text())
    assert plan["mesh"]["fsdp"] == 4 and plan["chips"] == 8
    assert (out / "plan.png").read_bytes().startswith(b"\x89PNG")
    pod = yaml.safe_load((out / "jobset.yaml").read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    command = pod["spec"]["containers"][0]["command"]
    assert command[:3] == ["dsjax", "train", "tiny"]
    changes = {name[2:].replace("-", "_"): value for name, _, value in (word.partition("=") for word in command[3:])}
    again = override(configs.load("tiny"), changes)  # the command is one that `dsjax train` takes
    assert (vars(again.mesh), again.batch_size) == (plan["mesh"], 16)


def test_the_search_compiles_the_best_and_takes_the_fastest_that_fits(monkeypatch):
    tried = []

    def compile_step(config, topology):
        tried.append(vars(config.mesh))
        if len(tried) == 1:
            raise compile.CompileError("does not fit v5e:2x4: a device needs 20.0 GiB", 20 * 2**30)
        sent = [{"axes": ("fsdp",), "bytes": 10**12 if len(tried) == 2 else 1}]
        return compile.Compiled(*(10,) * 12, sent, 1.0, 1.0, 1, "", "")

    monkeypatch.setattr(job, "available", lambda: True)
    monkeypatch.setattr(job, "compile_step", compile_step)
    config = job.planned(configs.load("tiny"), {}, 16, 256)
    lines, best, compiled = job.best(config, chips.parse("v5e:2x4"), 3)
    assert vars(best.mesh) == tried[2] and compiled.collectives[0]["bytes"] == 1
    assert lines[0][3:] == ("20.0", "does not fit v5e:2x4: a device needs 20.0 GiB")
    assert float(lines[1][4]) > float(lines[2][4]) and lines[3][4] == ""


def test_the_search_is_a_table():
    code, said = run("tiny", "--topology=v5e:2x4", "--batch=16", "--search")
    assert code == 0, said
    assert said.splitlines()[0].split()[:3] == ["mesh", "GiB", "step"] and "tiny on v5e:2x4: 8 chips" in said


def test_json_holds_the_same_numbers():
    code, said = run("tiny", "--topology=v5e:2x4", "--batch=16", "--json")
    assert code == 0
    plan = json.loads(said)
    assert {"section", "name", "value", "unit", "basis", "note"} == set(plan["numbers"][0])


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["tiny", "--topology=v9:2x2"], "no such chip"),
        (["tiny", "--topology=v5e:2x4", "--mesh.fsdp=3"], "but there are 8 devices"),
        (["tiny", "--topology=v5e:2x4", "--batch=12"], "does not divide batch_size / accumulate = 12"),
        (["tiny", "--topology=v5e:2x4", "--batch=16", "--slices=2"], "slices are joined by replicas"),
        (["tiny", "--topology=v5e:2x4", "--tokens=many"], "a number of tokens, as in 14.8T"),
        (["tiny", "--topology=v5e:2x4", "--price-per-chip-hour=-1"], "a price greater than 0"),
        (["nothing", "--topology=v5e:2x4"], "nothing"),
        (["tiny", "--topology=v5e:2x4", "--batch=16", "--out=/dev/null/plans"], "/dev/null"),
        (["tiny", "--topology=v5e:2x4", "--batch=16", "--keep-hlo=/dev/null/step.hlo"], "/dev/null"),
        (["tiny"], "topology"),
    ],
)
def test_bad_input_is_one_line(args, says, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.cli.main(["plan", *args, "--no-compile"], prog_name="dsjax")
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert says in said and said.count("\n") == 1


def test_without_libtpu_the_table_stands_and_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(job, "available", lambda: False)
    heard = []
    config = job.planned(configs.load("tiny"), {}, 16, 256)
    rows, _ = job.plan(config, chips.parse("v5e:2x4"), tokens=1e9, price=None, say=heard.append)
    assert rows and "pip install 'dsjax[plan]'" in heard[0]
    monkeypatch.setattr(compile, "available", lambda: False)
    with pytest.raises(ConfigError, match="pip install"):
        compile.compile_step(config, chips.parse("v5e:2x4"))


@pytest.mark.parametrize(
    ("error", "says", "needs"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 103.20G of 95.74G hbm. Exceeded hbm capacity "
         "by 7.46G.\n\nTotal hbm usage >= 103.20G", "needs 103.2 GiB of HBM and has 95.7 GiB", 103.20 * 2**30),
        ("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
         "temporaries (148.97G) exceeds available HBM (95.73G). HLO module: jit_train_step.",
         "needs 149.0 GiB of HBM and has 95.7 GiB", 148.97 * 2**30),
        ("E1001: CompileTimeScopedVmemOom: Ran out of memory in memory space vmem while allocating on stack for "
         "%fusion.13 = bf16[16384,7168] fusion(...)", "out of on-chip memory (vmem) at %fusion.13", None),
        ("INTERNAL: something\nelse", "the compiler refused: INTERNAL: something else", None),
    ],
)  # fmt: skip
def test_the_compilers_refusals_are_one_line_with_the_numbers(error, says, needs):
    message, used = compile.explain(error, chips.parse("v5p:8x8x8"))
    assert says in message and "\n" not in message
    assert used == (pytest.approx(needs) if needs else None)


def test_a_compiler_that_dies_is_one_line(monkeypatch):
    monkeypatch.setattr(compile, "available", lambda: True)
    monkeypatch.setattr(compile.sys, "executable", "/bin/false")
    with pytest.raises(ConfigError, match="ended with code 1"):
        compile.compile_step(configs.load("tiny"), chips.parse("v5e:2x4"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "changes", "crossed"),
    [
        ("v5e:2x4", {"mesh.data": "2", "mesh.expert": "2"}, {"data", "fsdp", "expert"}),
        ("v6e:2x4", {"mesh.context": "2", "mesh.tensor": "2"}, {"fsdp", "context", "tensor"}),
        ("v5p:2x2x1", {"mesh.expert": "4", "compute.expert_groups": "2"}, {"expert"}),
        ("tpu7x:2x2x1", {"mesh.expert": "4", "compute.overlap": "batch-split"}, {"fsdp", "expert"}),
    ],
)
def test_the_tiny_preset_compiles_for_a_real_tpu(text, changes, crossed):
    pytest.importorskip("libtpu")
    topology = chips.parse(text)
    config = job.on_slice(job.planned(configs.load("tiny"), changes, 16, 256), topology)
    compiled = compile.compile_step(config, topology)
    numbers = count.parameters(config.model)
    assert compiled.optimizer >= 8 * (numbers.total + numbers.mtp) / topology.devices
    assert compiled.hbm >= compiled.parameters + compiled.optimizer
    assert {axis for c in compiled.collectives for axis in c["axes"]} == crossed
    assert 0 < compiled.optimal_s < 1 and compiled.flops > 0
    rows = report.rows(config, topology, compiled)
    assert {"compiled", "measured"} <= {row.basis for row in rows}
