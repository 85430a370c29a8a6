"""A run that is killed again and again beside the same run left alone: do they end with the same numbers, at what cost?

    python -m benchmarks.survive small --steps 400 --kills 20 --folder /tmp/survive --precision=float32 ...

The disturbed run is killed (SIGKILL) at random steps, the disk is filled up once while it saves, and once bits of its
newest checkpoint are flipped before it starts again. Prints JSON; the run folders stay. Fields of the configuration are
options. Filling the disk needs the right to mount a small file system; without it that fault is left out, and said.
"""

import argparse
import contextlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common import machine
from dsjax.train.goodput_summary import summary
from dsjax.train.lines import read_lines

MAIN = [sys.executable, "-c", "from dsjax.cli import main; main()"]
DISK = "6g"


class Disturbed:
    """A run whose process does not live long."""

    def __init__(self, command: list[str], run: Path, draw: random.Random):
        self.command, self.run, self.draw, self.kills = command, run, draw, []

    def steps(self) -> int:
        """Steps that metrics tell of."""
        rows = [row["step"] for row in read_lines(self.run / "metrics.jsonl") if row["kind"] == "train"]
        return max(rows, default=0)

    def start(self) -> subprocess.Popen:
        log = (self.run.parent.parent / "disturbed.log").open("a")
        return subprocess.Popen(self.command, stderr=log, stdout=log)

    def kill_at(self, step: int, fault: str = "") -> bool:
        """Lives until a step and a moment more; False if the run ended before."""
        process = self.start()
        while self.steps() < step and process.poll() is None:
            time.sleep(0.02)
        if fault == "disk full" and process.poll() is None:
            self._fill_disk(process)
        time.sleep(self.draw.uniform(0, 2))
        if process.poll() is not None:
            return False
        process.send_signal(signal.SIGKILL)
        process.wait()
        saved = max((int(p.name) for p in (self.run / "checkpoints").glob("[0-9]*") if p.name.isdigit()), default=0)
        self.kills.append({"fault": fault or "SIGKILL", "at_step": self.steps(), "newest_checkpoint": saved})
        if fault == "damaged newest checkpoint":
            self._flip(self.run / "checkpoints" / str(saved))
        return True

    def _fill_disk(self, process: subprocess.Popen) -> None:
        """Until a save has failed for want of room; then there is room again, and the run goes on."""
        filler, failed = self.run.parent / "filler", self._failures()
        while self._failures() == failed and process.poll() is None:
            with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
                while True:
                    file.write(bytes(1 << 20))
            time.sleep(0.1)
        filler.unlink()

    def _failures(self) -> int:
        return (self.run.parent.parent / "disturbed.log").read_text().count("No space left on device")

    def _flip(self, checkpoint: Path) -> None:
        """One bit in each of the three largest files."""
        files = sorted((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        for path in files[-3:]:
            with path.open("r+b") as file:
                place = self.draw.randrange(path.stat().st_size)
                file.seek(place)
                byte = file.read(1)[0] ^ 1 << self.draw.randrange(8)
                file.seek(place)
                file.write(bytes([byte]))


def trace(run: Path) -> list[dict]:
    """Every number of every row, but for those of clocks."""
    clocks = ("time", "tokens_per_s", "input_s")
    rows = [row for row in read_lines(run / "metrics.jsonl") if row["kind"] != "run"]
    return [{name: value for name, value in row.items() if name not in clocks} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("preset")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    args, fields = parser.parse_known_args()
    draw = random.Random(args.seed)
    args.folder.mkdir(parents=True, exist_ok=True)
    command = [*MAIN, "train", args.preset, "--quiet", f"--steps={args.steps}", *fields]

    alone, disk = args.folder / "undisturbed", args.folder / "disk"
    if not trace(alone) or trace(alone)[-1]["step"] < args.steps:
        with (args.folder / "undisturbed.log").open("w") as log:
            subprocess.run([*command, f"--run={alone}"], check=True, stdout=log, stderr=log)

    disk.mkdir(exist_ok=True)
    small = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", disk]).returncode == 0
    begin = time.monotonic()
    try:
        disturbed = Disturbed([*command, f"--run={disk / 'run'}"], disk / "run", draw)
        moments = sorted(draw.sample(range(1, args.steps), args.kills))
        faults = {args.kills // 3: "damaged newest checkpoint"} | ({2 * args.kills // 3: "disk full"} if small else {})
        for n, step in enumerate(moments):
            disturbed.kill_at(step, faults.get(n, ""))
        last = disturbed.start().wait()
        seconds = time.monotonic() - begin
        shutil.copytree(
            disk / "run",
            args.folder / "disturbed",
            ignore=shutil.ignore_patterns("checkpoints", "damaged"),
            dirs_exist_ok=True,
        )
    finally:
        if small:
            subprocess.run(["umount", "-l", disk], check=True)

    runs = {"undisturbed": alone, "disturbed": args.folder / "disturbed"}
    spent = {name: summary(read_lines(run / "goodput.jsonl")) for name, run in runs.items()}
    result = {
        "command": "python -m benchmarks.survive " + " ".join(sys.argv[1:]),
        "machine": machine(),
        "kills": len(disturbed.kills),
        "faults": disturbed.kills,
        "last_exit_code": last,
        "rows_compared": len(trace(alone)),
        "same_trace": trace(alone) == trace(args.folder / "disturbed"),
        "disturbed_minutes": seconds / 60,
        "goodput_seconds": spent,
    }
    print(json.dumps(result, indent=1))
    sys.exit(0 if result["same_trace"] and last == 0 else 1)


if __name__ == "__main__":
    main()
