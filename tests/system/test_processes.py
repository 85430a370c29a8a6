"""Several processes of one job on this machine: they train as one, stop together, and a job goes on with fewer."""

import contextlib
import json
import signal
import socket
import subprocess
import time

import pytest
import runs

from dsjax.config import load, replace

STEPS = 12
HEARTBEAT_S = 5
END_S = 40  # of the others, after one was killed: the heartbeat, a last word, and two busy cores


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """The configuration of a run with one MoE layer."""
    folder = tmp_path_factory.mktemp("job")
    config = runs.micro(runs.write_texts(folder / "texts"), steps=STEPS, log_every=1, eval_every=6, checkpoint_every=4)
    model = replace(config.model, num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
    return runs.write_config(replace(config, model=model, keep_checkpoints=5), folder / "micro.json")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def whole(path, cache, tmp_path_factory):
    """The rows of a run of one process on one device, which nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    result = runs.dsjax("train", path, "--run", folder, "--quiet", env=runs.environment(cache))
    assert result.returncode == 0, result.stderr
    return runs.rows(folder)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def job(n: int, path, folders, *options: str, cache, devices: int = 1, command: str = "train"):
    """The n processes of a job, of so many fake devices each; none outlives the block."""

    def what(folder):
        return ["train", path, "--run", folder, "--quiet"] if command == "train" else [command, folder]

    address = f"--distributed.coordinator-address=127.0.0.1:{free_port()}"
    folders = folders if isinstance(folders, list) else [folders] * n
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                runs.started(
                    *what(folder), f"--devices={devices}", address,
                    f"--distributed.num-processes={n}", f"--distributed.process-id={i}",
                    f"--distributed.heartbeat-timeout-s={HEARTBEAT_S}", *options, env=runs.environment(cache),
                )
            )
            for i, folder in enumerate(folders)
        ]  # fmt: skip


def ends(processes: list[subprocess.Popen], within_s: float) -> list[tuple[int, str]]:
    """(exit code, what it said on standard error) of each process. Fails if one does not end in time."""
    deadline = time.monotonic() + within_s
    said = [process.communicate(timeout=max(1, deadline - time.monotonic()))[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said)]


def until_row(processes, folder, n: int, checkpoint: int) -> None:
    """Returns when so many rows of training are there, and this checkpoint."""
    deadline = time.monotonic() + 240
    while not (folder / "checkpoints" / str(checkpoint)).is_dir() or len(runs.rows(folder)) < n:
        dead = [process.communicate()[1] for process in processes if process.poll() is not None]
        assert not dead, dead
        assert time.monotonic() < deadline
        time.sleep(0.02)


def newest(folder) -> int:
    return max(int(step.name) for step in (folder / "checkpoints").iterdir() if step.name.isdigit())


def assert_same_losses(folder, whole) -> None:
    """Every step is there once, with the numbers of the undisturbed run."""
    rows = runs.rows(folder)
    assert [(row["kind"], row["step"]) for row in rows] == [(row["kind"], row["step"]) for row in whole]
    for row, wanted in zip(rows, whole):
        for name in ("loss", "heldout_nats", "grad_norm", "tokens", "load"):
            if name == "load" and name in row:
                assert row[name] == wanted[name]
            elif name in row:
                assert row[name] == pytest.approx(wanted[name], rel=1e-5)


@pytest.mark.slow
def test_sigterm_on_one_process_stops_all_at_one_step_and_one_process_goes_on(path, cache, whole, tmp_path):
    run = tmp_path / "run"
    with job(2, path, run, "--mesh.expert=2", cache=cache, devices=2) as processes:
        until_row(processes, run, 5, 4)
        processes[1].send_signal(signal.SIGTERM)
        (first, said), (second, _) = ends(processes, 60)
    assert (first, second) == (0, 0), said
    step = newest(run)
    assert f"SIGTERM: saved at step {step}; `dsjax train {run}` goes on from there" in said
    assert runs.rows(run)[-1]["step"] == step < STEPS
    result = runs.dsjax("train", path, "--run", run, "--quiet", "--mesh.expert=1", env=runs.environment(cache))
    assert result.returncode == 0, result.stderr
    assert f"resuming {run} at step {step}" in result.stderr and "distributed" not in result.stderr
    assert_same_losses(run, whole)
    with job(2, path, run, "--json", command="eval", cache=cache) as processes:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert json.loads(outputs[0])["heldout_nats"] == pytest.approx(whole[-1]["heldout_nats"], rel=1e-5)
    assert outputs[1] == ""
    assert "distributed" not in (run / "config.json").read_text()
    assert load(run / "config.json").distributed.num_processes is None


@pytest.mark.slow
def test_a_killed_process_ends_the_job_which_goes_on_with_fewer(path, cache, whole, tmp_path):
    run, killed = tmp_path / "run", 2
    with job(4, path, run, "--mesh.context=2", cache=cache) as processes:
        until_row(processes, run, 6, 4)
        processes[killed].send_signal(signal.SIGKILL)
        results = ends(processes, END_S)
    assert results[killed][0] == -signal.SIGKILL
    for code, said in results[:killed] + results[killed + 1 :]:
        assert code == 2, said
        last = said.splitlines()[-1]
        assert last.startswith("dsjax: ") and "killed or lost" in last and "start the job again" in last
        assert "Traceback" not in said
    step = newest(run)
    assert step >= 4
    with job(2, path, run, "--mesh.fsdp=-1", "--mesh.context=1", cache=cache, devices=2) as processes:
        results = ends(processes, 240)
    assert [code for code, _ in results] == [0, 0], results
    assert f"resuming {run} at step {step}" in results[0][1]
    assert_same_losses(run, whole)


@pytest.mark.slow
def test_where_the_first_process_is_killed_the_others_end_too(path, cache, whole, tmp_path):
    run = tmp_path / "run"
    with job(2, path, run, "--mesh.fsdp=2", cache=cache) as processes:
        until_row(processes, run, 6, 4)
        processes[0].send_signal(signal.SIGKILL)
        _, (code, said) = ends(processes, END_S)
    assert code not in (0, None)
    assert "another task died" in said or "killed or lost" in said  # JAX's own words, or ours
    step = newest(run)
    result = runs.dsjax("train", path, "--run", run, "--quiet", "--mesh.fsdp=-1", env=runs.environment(cache))
    assert result.returncode == 0 and f"resuming {run} at step {step}" in result.stderr, result.stderr
    assert_same_losses(run, whole)


@pytest.fixture(scope="module")
def of_two(path, cache, tmp_path_factory):
    """A run of two processes that nothing disturbed."""
    run = tmp_path_factory.mktemp("two") / "run"
    with job(2, path, run, "--mesh.fsdp=2", cache=cache) as processes:
        assert [code for code, _ in ends(processes, 240)] == [0, 0]
    return run


@pytest.mark.slow
def test_a_job_that_lost_a_process_goes_on_as_many_as_if_nothing_had_happened(path, cache, of_two, tmp_path):
    """The same number of processes afterwards: bit for bit."""
    run = tmp_path / "run"
    with job(2, path, run, "--mesh.fsdp=2", cache=cache) as processes:
        until_row(processes, run, 6, 4)
        processes[1].send_signal(signal.SIGKILL)
        ends(processes, END_S)
    with job(2, path, run, "--mesh.fsdp=2", cache=cache) as processes:
        results = ends(processes, 240)
    assert [code for code, _ in results] == [0, 0], results
    assert f"resuming {run} at step" in results[0][1]
    assert runs.rows(run) == runs.rows(of_two)


def test_an_error_on_the_first_process_ends_all_with_its_message(path, cache, tmp_path):
    with job(2, path, tmp_path / "run", "--data.sources=/nowhere.txt", cache=cache) as processes:
        first, second = ends(processes, 60)
    message = "data.sources=/nowhere.txt: no such file or folder; expected stdlib, a file, a folder or a glob\n"
    assert first[0] == second[0] == 2
    assert first[1].endswith(f"\ndsjax: {message}") and second[1].endswith(f"\ndsjax: process 0: {message}")


def test_a_folder_that_is_not_shared_is_said_by_all(path, cache, tmp_path):
    with job(2, path, [tmp_path / "a", tmp_path / "b"], cache=cache) as processes:
        results = ends(processes, 60)
    for code, said in results:
        assert code == 2
        assert said.endswith(
            "b: process 1 does not see what process 0 wrote there; expected a --run that all processes share\n"
        )
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("process", [0, 1])
def test_a_process_whose_others_do_not_come_ends_with_one_line(path, cache, tmp_path, process):
    address = f"127.0.0.1:{free_port()}"
    options = [f"--distributed.coordinator-address={address}", f"--distributed.process-id={process}"]
    options += ["--distributed.num-processes=2", "--distributed.start-timeout-s=2"]
    result = runs.dsjax("train", path, "--run", tmp_path / "run", *options, env=runs.environment(cache), timeout=60)
    assert result.returncode == 2
    waiting, late = result.stderr.splitlines()
    assert waiting == f"dsjax: waiting for 2 processes at {address}"
    assert late == f"dsjax: distributed: not all of 2 processes came to {address} within 2 s"


def test_a_cluster_of_one_process_is_one_process(path, cache, tmp_path):
    """Slurm's variables, as of `srun --ntasks=1`; with two tasks the other is waited for."""
    slurm = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    env = runs.environment(cache) | slurm
    for n, options, wanted in (
        ("1", [], "dsjax: data.sources=/nowhere.txt: no such file"),
        ("2", ["--distributed.auto=false"], "dsjax: data.sources=/nowhere.txt: no such file"),
        ("2", ["--distributed.start-timeout-s=2"], "dsjax: waiting for 2 processes at the coordinator of slurm\ndsjax: "
         "distributed: not all of 2 processes came to the coordinator of slurm within 2 s\n"),
    ):  # fmt: skip
        options += ["--data.sources=/nowhere.txt"]
        result = runs.dsjax(
            "train", path, "--run", tmp_path / "run", *options, env=env | {"SLURM_NTASKS": n}, timeout=60
        )
        assert result.returncode == 2 and result.stderr.startswith(wanted), result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--distributed.num-processes=2"],
            "distributed.coordinator_address: missing; expected coordinator_address, num",
        ),
        (["--devices=0"], "--devices=0: expected a whole number greater than 0"),
    ],
)
def test_half_a_description_is_refused(path, cache, tmp_path, options, message):
    result = runs.dsjax("train", path, "--run", tmp_path / "run", *options, env=runs.environment(cache))
    assert result.returncode == 2 and result.stderr.startswith(f"dsjax: {message}"), result.stderr
    assert result.stderr.count("\n") == 1


def test_fake_devices_need_a_cpu_and_a_new_process(path, cache, tmp_path):
    script = "import jax; jax.devices(); from dsjax.cli import main; main()"
    args = ["train", str(path), "--run", str(tmp_path / "run"), "--devices=3"]
    result = subprocess.run(
        [runs.MAIN[0], "-c", script, *args], env=runs.environment(cache), capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 2
    assert result.stderr == "dsjax: --devices=3: JAX has already started here, with 1 devices; expected a new process\n"
