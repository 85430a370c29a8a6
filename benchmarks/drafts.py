"""The engine with multi-token prediction drafting and without, on a model that was trained: speed and acceptance.

    python -m benchmarks.drafts runs/tiny --out benchmarks/results/drafts_tiny.json

Prompts are the beginnings of held-out documents. For each number of drafts and each temperature the same requests are
served one at a time and eight at once; the engine is warmed before. With drafts the text must be the same. "auto" is
how the engine goes by itself: with one draft a step where it pays.
"""

import argparse
import json
import time
from pathlib import Path

from benchmarks.common import machine

PROMPT, NEW = 64, 192


def serve(loaded, prompts, drafts: int | str, rows: int, temperature: float) -> tuple[list[list[int]], dict]:
    import jax

    from dsjax.config import EngineConfig
    from dsjax.infer.engine import Engine
    from dsjax.infer.requests import Request

    texts, n_draft = [[] for _ in prompts], 1 if drafts == "auto" else drafts
    with jax.set_mesh(loaded.mesh):
        engine = Engine(loaded, EngineConfig(max_rows=rows, n_draft=n_draft, max_model_len=512))
        if drafts != "auto":
            engine.pace.drafting = lambda rows: n_draft > 0
        engine.warm()
        for n, (prompt, text) in enumerate(zip(prompts, texts)):

            def tell(said, text=text):
                text.extend(one.token for one in said)

            engine.submit(Request(prompt, max_tokens=NEW, temperature=temperature, seed=n, tell=tell))
        begin = time.perf_counter()
        engine.run()
        seconds = time.perf_counter() - begin
    decoding = seconds - engine.counts["prefill_us"] / 1e6
    drafted, accepted = engine.drafted_at.tolist(), engine.accepted_at.tolist()
    return texts, {
        "drafts": drafts,
        "rows": rows,
        "temperature": temperature,
        "tokens_per_s": len(prompts) * (NEW - 1) / decoding,
        "step_ms": engine.counts["step_us"] / engine.counts["steps"] / 1e3,
        "accepted": [a / d for a, d in zip(accepted, drafted) if d],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--drafts", type=lambda s: s if s == "auto" else int(s), nargs="*", default=[0, 1, 2, "auto"])
    parser.add_argument("--temperatures", type=float, nargs="*", default=[0.0, 0.7, 1.0])
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from dsjax.hub.load import load

    loaded = load(args.run)
    text = (args.run / "data" / "heldout.txt").read_text(encoding="utf-8", errors="replace")
    ids = loaded.tokenizer.encode(text)
    apart = max(PROMPT, (len(ids) - PROMPT) // args.prompts)
    prompts = [[loaded.tokenizer.bos_id, *ids[i * apart : i * apart + PROMPT - 1]] for i in range(args.prompts)]
    prompts = [prompt for prompt in prompts if len(prompt) == PROMPT]
    rows = []
    for n_rows in args.rows:
        for temperature in args.temperatures:
            plain = None
            for drafts in args.drafts:
                texts, row = serve(loaded, prompts, drafts, n_rows, temperature)
                plain = plain or (texts, row["tokens_per_s"])
                row |= {"same_text": texts == plain[0], "speed": row["tokens_per_s"] / plain[1]}
                rows.append(row)
                print(json.dumps(row), flush=True)
    result = {"machine": machine(), "run": str(args.run), "prompts": len(prompts), "prompt_tokens": PROMPT}
    result |= {"new_tokens": NEW, "rows": rows}
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
