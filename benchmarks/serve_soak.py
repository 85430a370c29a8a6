"""`dsjax serve` under 64 clients of which a third go away: is every answer that of an idle server, does anything leak?

    python -m benchmarks.serve_soak runs/tiny --out benchmarks/results/serve_soak_tiny.json
    python -m benchmarks.serve_soak --table benchmarks/results/serve_soak_tiny.json

A set of requests is answered by the idle server first, one at a time. Then clients ask these at random, and others
between them; a third of the requests is given up: at once, before the first token, or in the middle. The cache is too
small for all rows, so that requests lose their pages and get them back. Served with --one-shape, every text must be the
same; --any-shape leaves the option out, and counts those that differ.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from benchmarks.common import machine
from benchmarks.serving import Questions, Served, parse, served

OPTIONS = ["--max-rows=32", "--max-model-len=768", "--cache-tokens=4096"]
WELL = ("as alone", "of the others", "left in the middle", "left before the first piece")
EVERY_S = 5  # samples of the server's memory


@dataclass
class Leaves:
    """When a client goes away: after some seconds, or some pieces."""

    seconds: float | None = None
    pieces: int | None = None


async def ask(url: str, path: str, body: dict, leaves: Leaves = Leaves()) -> dict | str:
    """The choices of an answer, or why there is none."""
    place = urlsplit(url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: it\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n"
    pieces = 0
    try:
        async with asyncio.timeout(leaves.seconds):
            writer.write(head.encode() + b"Connection: close\r\n\r\n" + content)
            status = int((await reader.readline()).split()[1])
            while (await reader.readline()).strip():
                pass
            if not body["stream"] or status != 200:
                answer = json.loads(await reader.read())
                return _choices([answer]) if status == 200 else f"status {status}: {answer['error']['message']}"
            chunks = []
            while line := await reader.readline():
                if line.startswith(b"data: [DONE]"):
                    return _choices(chunks)
                if line.startswith(b"data: "):
                    chunks.append(json.loads(line[6:]))
                    pieces += 1
                    if "error" in chunks[-1]:
                        return chunks[-1]["error"]["message"]
                    if pieces == leaves.pieces:
                        return "left in the middle"
            return "the stream broke off"
    except TimeoutError:
        return "left in the middle" if pieces else "left before the first piece"
    finally:
        writer.transport.abort()


def _choices(chunks: list[dict]) -> dict:
    """Text and reason by index, whole or in pieces."""
    found: dict[int, list] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        said = choice.get("message") or choice.get("delta")
        one = found.setdefault(choice["index"], ["", None])
        one[0] += choice["text"] if said is None else said.get("content") or ""
        one[1] = choice["finish_reason"] or one[1]
    return found


@dataclass
class Soak:
    """The clients, and what they met."""

    server: Served
    questions: Questions
    known: list[tuple[str, dict, dict | None]]  # path, body, the answer alone
    draw: random.Random
    met: Counter = field(default_factory=Counter)
    wrong: list[dict] = field(default_factory=list)

    async def client(self, until: float) -> None:
        while time.monotonic() < until:
            path, body, alone = self.draw.choice(self.known)
            if self.draw.random() < 0.25:
                (path, body), alone = self.questions.any(), None
            body = body | {"stream": self.draw.random() < 0.75}
            leaves = Leaves()
            if self.draw.random() < 1 / 3:
                at_once, soon, later = Leaves(self.draw.uniform(0, 0.05)), Leaves(self.draw.uniform(0, 3)), Leaves(3)
                if body["stream"]:
                    later = Leaves(pieces=self.draw.randint(1, 40))
                leaves = self.draw.choice([at_once, soon, later])
            got = await ask(self.server.url, path, body, leaves)
            if isinstance(got, str):
                self.met[got] += 1
            elif alone is None:
                self.met["of the others"] += 1
            elif got == alone:
                self.met["as alone"] += 1
            else:
                self.met["not as alone"] += 1
                self.wrong.append({"path": path, "body": body, "alone": alone, "got": got})

    async def run(self, n: int, seconds: float) -> list[dict]:
        """Samples of the server while n clients ask."""
        begin, samples = time.monotonic(), []
        clients = [asyncio.create_task(self.client(begin + seconds)) for _ in range(n)]
        while not all(client.done() for client in clients):
            found = await asyncio.to_thread(self.server.metrics)
            samples.append(
                {
                    "s": round(time.monotonic() - begin, 1),
                    "rss_mib": round(self.server.rss_mib(), 2),
                    "running": int(found["dsjax_requests_running"]),
                    "waiting": int(found["dsjax_requests_waiting"]),
                    "pages_held": int(found['dsjax_cache_pages{state="held"}']),
                }
            )
            await asyncio.wait(clients, timeout=EVERY_S)
        await asyncio.gather(*clients)
        return samples


def slope(samples: list[dict], after_s: float) -> float:
    """MiB a minute of resident memory, by least squares, after some seconds."""
    late = [row for row in samples if row["s"] >= after_s]
    if len(late) < 3:
        return float("nan")
    return 60 * statistics.linear_regression([r["s"] for r in late], [r["rss_mib"] for r in late]).slope


def pages(metrics: dict[str, float]) -> dict[str, int]:
    return {state: int(metrics[f'dsjax_cache_pages{{state="{state}"}}']) for state in ("held", "idle", "free")}


def soak(args: argparse.Namespace) -> dict:
    options = [*OPTIONS, *(() if args.any_shape else ("--one-shape",))]
    text = (args.run / "data" / "heldout.txt").read_text(encoding="utf-8", errors="replace")
    with served(args.run, *options) as server:
        questions, n_pages = Questions(server, text, args.seed), sum(pages(server.metrics()).values())
        asked = [questions.any(stream=False, n=1 + (i % 8 == 0)) for i in range(args.known)]

        def alone(path: str, body: dict) -> dict:
            return asyncio.run(ask(server.url, path, body))

        known = [(path, body, alone(path, body)) for path, body in asked]
        it = Soak(server, questions, known, random.Random(args.seed))
        begin = server.metrics()
        samples = asyncio.run(it.run(args.clients, args.seconds))
        end = server.wait_idle()
        again = [alone(path, body) == answer for path, body, answer in known[:8]]
        ended = {
            "requests_running": int(end["dsjax_requests_running"]),
            "requests_waiting": int(end["dsjax_requests_waiting"]),
            "pages": pages(end),
            "pages_lost": n_pages - sum(pages(end).values()),
            "failed_steps": int(end["dsjax_failed_steps_total"]),
        }
        warm_s = args.seconds / 2
        result = {
            "server_options": options,
            "clients": args.clients,
            "seconds": args.seconds,
            "known_requests": len(known),
            "answers": dict(sorted(it.met.items())),
            "wrong": it.wrong[:3],
            "as_before_when_alone_again": all(again),
            "preemptions": int(end["dsjax_preemptions_total"] - begin["dsjax_preemptions_total"]),
            "generated_tokens": int(end["dsjax_generated_tokens_total"] - begin["dsjax_generated_tokens_total"]),
            "cancelled": int(end.get('dsjax_requests_ended_total{reason="cancelled"}', 0)),
            "most_waiting": max(row["waiting"] for row in samples),
            "at_the_end": ended,
            "rss_mib": {"first": samples[0]["rss_mib"], "last": samples[-1]["rss_mib"]},
            "rss_mib_a_minute": round(slope(samples, warm_s), 3),
            "rss_slope_after_s": warm_s,
            "samples": samples,
        }
    result["passed"] = (
        (args.any_shape or not it.wrong)
        and set(it.met) <= {*WELL, "not as alone"}
        and not any((ended["requests_running"], ended["requests_waiting"], ended["pages"]["held"], ended["pages_lost"]))
        and not ended["failed_steps"]
        and all(again)
    )
    return result


def table(result: dict) -> str:
    """The measurement as a table of Markdown."""
    met, end = result["answers"], result["at_the_end"]
    rows = {
        "clients, minutes": f"{result['clients']}, {result['seconds'] / 60:.0f}",
        "answers equal to those alone": met.get("as alone", 0),
        "answers that differ": met.get("not as alone", 0),
        "answers to the others": met.get("of the others", 0),
        "gone before the first piece": met.get("left before the first piece", 0),
        "gone in the middle": met.get("left in the middle", 0),
        "errors": sum(n for name, n in met.items() if name not in (*WELL, "not as alone")),
        "requests that lost their pages and got them back": result["preemptions"],
        "at the end: requests running, waiting": f"{end['requests_running']}, {end['requests_waiting']}",
        "at the end: pages held, lost": f"{end['pages']['held']}, {end['pages_lost']}",
        "memory at the beginning and the end": "{first:.0f}, {last:.0f} MiB".format(**result["rss_mib"]),
        f"its slope after {result['rss_slope_after_s']:.0f} s": f"{result['rss_mib_a_minute']:+.2f} MiB a minute",
    }
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--known", type=int, default=32, help="requests whose answers are known")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--any-shape", action="store_true", help="serve without --one-shape")
    args = parse(parser, table)
    result = {"command": "python -m benchmarks.serve_soak " + " ".join(sys.argv[1:]), "machine": machine()}
    result |= soak(args)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "samples"}, indent=1))
    print(table(result))
    sys.exit(not result["passed"])


if __name__ == "__main__":
    main()
