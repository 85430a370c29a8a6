"""Writes golden/: what transformers says of every kind, so that tests without torch can hold us to it.

    python tests/parity/make_golden.py           # all kinds
    python tests/parity/make_golden.py v3 v2     # some

Needs the `parity` extra. Weights are not kept: `kinds.draw` makes the same ones from config.json on every machine.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[2]))

import kinds
import numpy as np

GOLDEN = Path(__file__).parent / "golden"


def make(kind: str) -> tuple[dict, np.ndarray]:
    """What lies in KIND.json, and the logits of KIND.npz."""
    import oracle  # needs torch

    raw = kinds.KINDS[kind]
    tensors = kinds.draw(raw)
    with tempfile.TemporaryDirectory() as folder:
        model = oracle.read(kinds.write_folder(Path(folder), raw, tensors))
    tokens = oracle.clear_tokens(model, raw)
    numbers = oracle.theirs(model, tokens)
    values = {
        "config": raw,
        "weights": kinds.fingerprint(tensors),
        "tokens": tokens.tolist(),
        "greedy": numbers.greedy,
        "loss": numbers.loss,
        "gradient_norms": kinds.norms(numbers.gradients),
    }
    return values, numbers.logits


def read(kind: str) -> tuple[dict, np.ndarray]:
    """The same from the files."""
    return json.loads((GOLDEN / f"{kind}.json").read_text()), np.load(GOLDEN / f"{kind}.npz")["logits"]


def main(names: list[str]) -> None:
    GOLDEN.mkdir(exist_ok=True)
    for kind in names or kinds.KINDS:
        values, logits = make(kind)
        lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in values.items())
        (GOLDEN / f"{kind}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
        np.savez_compressed(GOLDEN / f"{kind}.npz", logits=logits)
        print(f"{kind}: loss {values['loss']:.6f}, logits' standard deviation {logits.std():.3f}")


if __name__ == "__main__":
    main(sys.argv[1:])
