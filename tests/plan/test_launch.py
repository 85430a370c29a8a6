"""The launch files are what their readers take."""

import subprocess

import pytest
import yaml

from dsjax.plan import chips, launch

COMMAND = ["dsjax", "train", "v3", "--mesh.fsdp=64", "--data.sources=gs://a b/it's"]


@pytest.mark.parametrize("text", ["v5e:4x4", "v5p:8x8x8", "v6e:16x16", "tpu7x:4x8x8", "v5p:2x2x1"])
@pytest.mark.parametrize("slices", [1, 3])
def test_the_files_are_valid_and_ask_for_the_slice(tmp_path, text, slices):
    topology = chips.parse(text)
    paths = {path.name: path for path in launch.write(tmp_path, "dsjax-v3", COMMAND, topology, slices)}

    job = yaml.safe_load(paths["jobset.yaml"].read_text())
    replicated = job["spec"]["replicatedJobs"][0]
    hosts = replicated["template"]["spec"]
    pod = hosts["template"]["spec"]
    assert (job["apiVersion"], job["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert replicated["replicas"] == slices
    assert hosts["parallelism"] == hosts["completions"] == topology.hosts
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology.extent
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == topology.chip.gke_accelerator
    container = pod["containers"][0]
    assert container["command"] == COMMAND
    assert container["resources"]["limits"]["google.com/tpu"] * topology.hosts == topology.chips

    assert ("queued_resource.sh" in paths) == bool(topology.chip.cloud)
    for path in paths.values():
        if path.suffix == ".sh":
            subprocess.run(["bash", "-n", path], check=True, capture_output=True)


def test_slurm_runs_the_command_once_a_gpu(tmp_path):
    script = launch.slurm("v3", COMMAND, 512)
    assert "#SBATCH --nodes=64\n#SBATCH --ntasks-per-node=8\n" in script
    runs = tmp_path / "srun"
    runs.write_text('#!/bin/sh\nshift\nprintf "%s\\n" "$@"\n')
    runs.chmod(0o755)
    (tmp_path / "job.sh").write_text(script)
    said = subprocess.run(
        ["bash", tmp_path / "job.sh"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert said.stdout.splitlines() == COMMAND


def test_queued_resource_commands_queue_wait_and_start_the_command(tmp_path):
    gcloud = tmp_path / "gcloud"
    gcloud.write_text('#!/bin/sh\necho "$@" >> "$LOG"\ncase "$*" in *describe*) echo ACTIVE;; esac\n')
    gcloud.chmod(0o755)
    script = tmp_path / "job.sh"
    script.write_text(launch.queued_resource("v3", COMMAND, chips.parse("v5p:8x8x8"), 2))
    log = tmp_path / "log"
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PROJECT": "p", "ZONE": "z", "LOG": str(log)}
    subprocess.run(["bash", script], env=environment, check=True, capture_output=True)
    lines = log.read_text().splitlines()
    assert lines[0].startswith("compute tpus queued-resources create v3 --node-count=2 --node-prefix=v3 ")
    assert "--type=v5p --topology=8x8x8" in lines[0]
    assert sum("tpu-vm ssh" in line for line in lines) == 2
    without = {name: value for name, value in environment.items() if name != "ZONE"}
    assert subprocess.run(["bash", script], env=without, capture_output=True).returncode != 0


@pytest.mark.parametrize(
    ("name", "made"), [("dsjax-moe_16b", "dsjax-moe-16b"), ("My Run!", "my-run"), ("3b", "job-3b")]
)
def test_names_are_what_kubernetes_takes(name, made):
    assert launch.job_name(name) == made
