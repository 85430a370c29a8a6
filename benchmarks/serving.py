"""What the benchmarks of the server share: a server in its own process, what to ask it, what it says of itself.

No JAX here: the process that asks is to leave the cores to the one that answers.
"""

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAIN = [sys.executable, "-c", "from dsjax.cli import main; main()"]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
PROMPT, NEW = (16, 512), (16, 128)  # tokens: shortest and longest
SHARED = 256  # tokens with which prompts begin that begin alike


@dataclass
class Served:
    """A server that runs."""

    process: subprocess.Popen
    url: str

    def ask(self, path: str, body: dict | None = None) -> bytes:
        """The answer to one request. Raises HTTPError."""
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, content, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as answer:
            return answer.read()

    def metrics(self) -> dict[str, float]:
        """Name, with its labels, -> value."""
        lines = self.ask("/metrics").decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}

    def rss_mib(self) -> float:
        """Resident memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s*(\d+)", status)[1]) / 1024

    def cpu_s(self) -> float:
        """Seconds of processors used so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def wait_idle(self, seconds: float = 60) -> dict[str, float]:
        """Metrics when no request runs or waits any more, or the time is over."""
        end = time.monotonic() + seconds
        while True:
            found = self.metrics()
            if not found["dsjax_requests_running"] + found["dsjax_requests_waiting"] or time.monotonic() > end:
                return found
            time.sleep(0.2)


@contextlib.contextmanager
def served(run: Path, *options: str) -> Iterator[Served]:
    """`dsjax serve RUN` on a free port until the end of the block. A run without a chat template gets a plain one."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, log = Path(scratch) / "it", Path(scratch) / "log"
        folder.mkdir()
        for path in run.iterdir():
            (folder / path.name).symlink_to(path.resolve())
        if not (folder / "chat_template.jinja").exists():
            (folder / "chat_template.jinja").write_text(TEMPLATE)
        with log.open("w") as file:
            process = subprocess.Popen([*MAIN, "serve", str(folder), "--port=0", *options], stderr=file)
        try:
            while not (found := re.search(r"http://\S+", log.read_text())):
                if process.poll() is not None:
                    sys.exit(log.read_text())
                time.sleep(0.1)
            yield Served(process, found[0])
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
            sys.stderr.write(log.read_text())


class Questions:
    """Bodies of requests, drawn from a text: prompts and answers of mixed length, some prompts begin alike."""

    def __init__(self, server: Served, text: str, seed: int = 0):
        self.ids: list[int] = json.loads(server.ask("/tokenize", {"prompt": text}))["tokens"]
        self.text, self.draw = text, random.Random(seed)

    def completion(self, **more: Any) -> dict:
        """Of /v1/completions."""
        n = self.draw.randint(*PROMPT)
        at = self.draw.randrange(SHARED, len(self.ids) - n)
        shared = self.ids[: SHARED * (self.draw.random() < 0.25)]
        prompt = (shared + self.ids[at : at + n])[:n]
        return {"prompt": prompt, **self._shared(), **more}

    def chat(self, **more: Any) -> dict:
        """Of /v1/chat/completions: characters for tokens, which are about twice as many."""
        n = 2 * self.draw.randint(PROMPT[0], PROMPT[1] // 2)
        at = self.draw.randrange(len(self.text) - n)
        return {"messages": [{"role": "user", "content": self.text[at : at + n]}], **self._shared(), **more}

    def any(self, **more: Any) -> tuple[str, dict]:
        """A path and its body."""
        if self.draw.random() < 0.5:
            return "/v1/completions", self.completion(**more)
        return "/v1/chat/completions", self.chat(**more)

    def _shared(self) -> dict:
        seed, new = self.draw.randrange(1 << 32), self.draw.randint(*NEW)
        return {"max_tokens": new, "temperature": self.draw.choice([0, 0.7]), "seed": seed, "ignore_eos": True}


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds: p50, p95, p99."""
    ordered = sorted(seconds)
    if not ordered:
        return {}
    return {f"p{p}": round(1e3 * ordered[min(len(ordered) - 1, len(ordered) * p // 100)], 2) for p in (50, 95, 99)}


def parse(parser: argparse.ArgumentParser, table: Callable[[dict], str]) -> argparse.Namespace:
    """The arguments, with those of every benchmark of the server; --table prints a kept result, and ends."""
    parser.add_argument("run", type=Path, nargs="?", help="run folder to serve")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--table", type=Path, help="print the table of this JSON, and measure nothing")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text())))
        parser.exit()
    if args.run is None:
        parser.error("expected a run folder, or --table")
    return args
