"""Files that start a planned job: a GKE JobSet, queued-resource commands for TPU VMs, a Slurm script for GPUs."""

import json
import re
import shlex
from pathlib import Path

from dsjax.plan.chips import Topology

_CHIPS_A_HOST = 4
_GPUS_A_NODE = 8


def write(folder: Path, name: str, command: list[str], topology: Topology, slices: int = 1) -> list[Path]:
    """Writes the launch files of a training command into a folder; returns their paths."""
    files = {
        "jobset.yaml": jobset(name, command, topology, slices),
        "slurm.sh": slurm(name, command, topology.devices * slices),
    }
    if topology.chip.cloud:
        files["queued_resource.sh"] = queued_resource(name, command, topology, slices)
    paths = []
    for file, text in files.items():
        path = folder / file
        path.write_text(text)
        if path.suffix == ".sh":
            path.chmod(0o755)
        paths.append(path)
    return paths


def job_name(text: str) -> str:
    """A text as Kubernetes, Cloud and Slurm take names: small letters, digits and dashes."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].strip("-")
    return name if name[:1].isalpha() else f"job-{name}".strip("-")


def jobset(name: str, command: list[str], topology: Topology, slices: int = 1) -> str:
    """A JobSet of one pod a host on `slices` slices, restarted whole when a host is lost."""
    chips = min(topology.chips, _CHIPS_A_HOST)
    return f"""\
# kubectl apply -f jobset.yaml; needs JobSet on the cluster and a node pool of {topology.chip.gke_machine}
# with --tpu-topology={topology.extent}. Set the image and the bucket.
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {job_name(name)}
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: 100
  replicatedJobs:
    - name: slice
      replicas: {slices}
      template:
        spec:
          parallelism: {topology.hosts}
          completions: {topology.hosts}
          backoffLimit: 0
          template:
            spec:
              restartPolicy: Never
              hostNetwork: true
              dnsPolicy: ClusterFirstWithHostNet
              terminationGracePeriodSeconds: 120
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: {topology.chip.gke_accelerator}
                cloud.google.com/gke-tpu-topology: {topology.extent}
              containers:
                - name: train
                  image: IMAGE_WITH_DSJAX_TPU
                  ports:
                    - containerPort: 8471
                    - containerPort: 8080
                  command: {json.dumps(command)}
                  resources:
                    limits:
                      google.com/tpu: {chips}
"""


def queued_resource(name: str, command: list[str], topology: Topology, slices: int = 1) -> str:
    """Shell commands that queue for TPU VMs, wait, and start the job on every host."""
    name, chip = job_name(name), topology.chip
    nodes = f"--node-id={name}" if slices == 1 else f"--node-count={slices} --node-prefix={name}"
    vms = [name] if slices == 1 else [f"{name}-{i}" for i in range(slices)]
    run = shlex.quote("pip install 'dsjax[tpu]' && " + shlex.join(command))
    starts = "\n".join(
        f'gcloud compute tpus tpu-vm ssh {vm} --zone="$ZONE" --project="$PROJECT" --worker=all \\\n  --command={run} &'
        for vm in vms
    )
    return f"""\
#!/usr/bin/env bash
# {topology.cloud_name}: {topology.chips} chips, {topology.hosts} hosts, {slices} slice(s).
# PROJECT=... ZONE=... ./queued_resource.sh
set -euo pipefail
: "${{PROJECT:?the Google Cloud project}}" "${{ZONE:?a zone with {chip.name}}}"

gcloud compute tpus queued-resources create {name} {nodes} \\
  --zone="$ZONE" --project="$PROJECT" \\
  --type={chip.cloud} --topology={topology.extent} \\
  --runtime-version={chip.runtime}

until gcloud compute tpus queued-resources describe {name} --zone="$ZONE" --project="$PROJECT" \\
  --format='value(state.state)' | grep -q ACTIVE; do
  sleep 60
done

{starts}
wait

# gcloud compute tpus queued-resources delete {name} --zone="$ZONE" --project="$PROJECT" --force
"""


def slurm(name: str, command: list[str], n_devices: int) -> str:
    """A Slurm script of one process a GPU on as many GPUs as the plan has devices."""
    gpus = min(n_devices, _GPUS_A_NODE)
    return f"""\
#!/usr/bin/env bash
#SBATCH --job-name={job_name(name)}
#SBATCH --nodes={-(-n_devices // _GPUS_A_NODE)}
#SBATCH --ntasks-per-node={gpus}
#SBATCH --gpus-per-node={gpus}
#SBATCH --cpus-per-task=12
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal=TERM@120
# The plan is for TPUs; the mesh is the same on {n_devices} GPUs. JAX finds the job's processes from Slurm.
set -euo pipefail

srun --kill-on-bad-exit=1 {shlex.join(command)}
"""
