"""Throughput and latencies of `dsjax serve` under 1, 8 and 64 clients, asked by locust.

    pip install -e '.[serve,load]'
    python -m benchmarks.serve_load runs/tiny --out benchmarks/results/serve_load_tiny.json
    python -m benchmarks.serve_load --table benchmarks/results/serve_load_tiny.json

Each client asks again as soon as it has its answer: completions and chats, streamed, prompts of 16 to 512 tokens, 16 to
128 new ones, temperature 0 or 0.7, every fourth long prompt with a beginning that others share. locust shares the cores
with the server; the seconds of processors that each of them took are in the JSON.
"""

import argparse
import json
import sys
import time

from benchmarks.common import machine
from benchmarks.serving import Questions, Served, parse, percentiles, served

MAX_ROWS, LONGEST = 64, 1024
COUNTS = {
    "prompt_tokens": "dsjax_prompt_tokens_total",
    "cached_tokens": "dsjax_cached_tokens_total",
    "generated_tokens": "dsjax_generated_tokens_total",
    "preemptions": "dsjax_preemptions_total",
    "drafted": 'dsjax_drafted_tokens_total{position="1"}',
    "accepted": 'dsjax_accepted_tokens_total{position="1"}',
    "steps": "dsjax_steps_total",
}


class Seen:
    """What clients saw."""

    def __init__(self):
        self.first, self.between, self.whole, self.errors, self.refused = [], [], [], [], 0

    def stream(self, response, begin: float) -> None:
        """Reads one answer to its end."""
        if response.status_code == 429:
            self.refused += 1
            response.failure("429")
            return
        if response.status_code != 200:
            self.errors.append(f"status {response.status_code}")
            response.failure(self.errors[-1])
            return
        last = done = None
        while line := response.stream.readline(b"\n"):
            if not line.startswith(b"data: "):
                continue
            now = time.perf_counter()
            if line.startswith(b"data: [DONE]"):
                done = now
                continue
            piece = json.loads(line[6:])
            if "error" in piece:
                self.errors.append(piece["error"]["message"])
            elif "role" not in piece["choices"][0].get("delta", ()):
                (self.first if last is None else self.between).append(now - (begin if last is None else last))
                last = now
        if done is None:
            self.errors.append("the stream broke off")
            response.failure("broken")
        else:
            self.whole.append(done - begin)
            response.success()


def measure(server: Served, questions: Questions, n: int, warm_s: float, seconds: float) -> dict:
    """n clients for so many seconds, after some to warm up."""
    import gevent
    from locust import FastHttpUser, constant, task
    from locust.env import Environment

    seen = Seen()

    class Client(FastHttpUser):
        host, wait_time, network_timeout = server.url, constant(0), 600.0

        @task
        def ask(self):
            path, body = questions.any(stream=True)
            begin = time.perf_counter()
            with self.client.post(path, json=body, stream=True, catch_response=True) as response:
                seen.stream(response, begin)

    runner = Environment(user_classes=[Client]).create_local_runner()
    runner.start(n, spawn_rate=n)
    gevent.sleep(warm_s)
    seen.__init__()
    before, cpu, own, begin = server.metrics(), server.cpu_s(), time.process_time(), time.perf_counter()
    gevent.sleep(seconds)
    after, took = server.metrics(), time.perf_counter() - begin
    rss, cpu, own = server.rss_mib(), server.cpu_s() - cpu, time.process_time() - own
    found = {
        "clients": n,
        "seconds": round(took, 1),
        "requests": len(seen.whole),
        "requests_per_s": round(len(seen.whole) / took, 2),
        "first_token_ms": percentiles(seen.first),
        "between_pieces_ms": percentiles(seen.between),
        "whole_ms": percentiles(seen.whole),
        "errors": len(seen.errors),
        "error_examples": sorted(set(seen.errors))[:5],
        "refused_429": seen.refused,
    }
    runner.quit()
    counts = {name: round(after[key] - before[key]) for name, key in COUNTS.items()}
    found |= {"output_tokens_per_s": round(counts["generated_tokens"] / took, 1), **counts}
    found["accepted_share"] = round(counts["accepted"] / max(1, counts["drafted"]), 3)
    found["cached_share"] = round(counts["cached_tokens"] / max(1, counts["prompt_tokens"]), 3)
    found |= {"server_rss_mib": round(rss), "server_cpu_s": round(cpu, 1), "locust_cpu_s": round(own, 1)}
    server.wait_idle()
    return found


def table(result: dict) -> str:
    """The measurement as a table of Markdown."""
    heads = [
        "clients",
        "requests a second",
        "tokens a second",
        "first token, ms: p50 / p95 / p99",
        "between pieces, ms: p50 / p95 / p99",
        "drafts accepted",
        "prompt from the cache",
        "errors, 429",
        "memory",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in result["loads"]:
        cells = [
            row["clients"],
            f"{row['requests_per_s']:.1f}",
            f"{row['output_tokens_per_s']:.0f}",
            " / ".join(f"{value:.0f}" for value in row["first_token_ms"].values()),
            " / ".join(f"{value:.0f}" for value in row["between_pieces_ms"].values()),
            f"{row['accepted_share']:.0%}" if row["drafted"] else "none drafted",
            f"{row['cached_share']:.0%}",
            f"{row['errors']}, {row['refused_429']}",
            f"{row['server_rss_mib']} MiB",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--warm-s", type=float, default=10)
    args = parse(parser, table)
    text = (args.run / "data" / "heldout.txt").read_text(encoding="utf-8", errors="replace")
    options = [f"--max-rows={MAX_ROWS}", f"--max-model-len={LONGEST}"]
    result = {"command": "python -m benchmarks.serve_load " + " ".join(sys.argv[1:]), "machine": machine()}
    result |= {"server_options": options, "loads": []}
    with served(args.run, *options) as server:
        questions = Questions(server, text)
        for n in args.clients:
            result["loads"].append(measure(server, questions, n, args.warm_s, args.seconds))
            print(json.dumps(result["loads"][-1]), flush=True)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    sys.exit(any(row["errors"] for row in result["loads"]))


if __name__ == "__main__":
    main()
