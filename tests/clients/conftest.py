"""A model that was taught four talks, served by `dsjax serve` to the clients that people use."""

import re
import threading
import time

import models
import numpy as np
import pytest
import runs
from talks import NAME, TALKS, TEMPLATE, asked

import dsjax
from dsjax.config import Config, DataConfig, OptimizerConfig


@pytest.fixture(scope="session")
def taught(tmp_path_factory):
    """The run folder of a model that knows TALKS by heart."""
    folder = tmp_path_factory.mktemp("taught")
    (folder / "texts").mkdir()
    for i in range(40):
        question, answer = list(TALKS.items())[i % 4]
        (folder / "texts" / f"{i:02}.txt").write_text(asked(question) + answer, encoding="utf-8")
    config = Config(
        name=NAME,
        steps=120,
        batch_size=4,
        seq_len=64,
        log_every=60,
        eval_every=120,
        checkpoint_every=120,
        model=models.v3(
            vocab_size=420, hidden_size=64, num_hidden_layers=2, max_position_embeddings=512, initializer_range=0.05
        ),
        optimizer=OptimizerConfig(peak_lr=5e-3, warmup_steps=10, schedule="cosine"),
        data=DataConfig(sources=(str(folder / "texts"),), heldout_fraction=0.1, packing="best_fit"),
        compute=models.COMPUTE,
    )
    path, run = runs.write_config(config, folder / "taught.json"), folder / "run"
    done = runs.dsjax("train", path, "--run", run, "--quiet", env=runs.environment(folder / "compiled"))
    assert done.returncode == 0, done.stderr
    (run / "chat_template.jinja").write_text(TEMPLATE)
    return run


@pytest.fixture(scope="session")
def url(taught):
    """Where it is served."""
    options = ["--port=0", "--max-rows=4", "--prefill-chunk=32", "--one-shape", f"--name={NAME}", "--api-key=key"]
    with runs.started("serve", taught, *options, env=runs.environment(taught.parent / "compiled")) as process:
        said: list[str] = []
        reader = threading.Thread(target=lambda: said.extend(process.stderr), daemon=True)
        reader.start()
        end = time.monotonic() + 120
        while not (found := re.search(r"http://\S+", "".join(said))):
            assert process.poll() is None and time.monotonic() < end, said
            time.sleep(0.05)
        yield found[0]
        assert process.poll() is None, said
        process.terminate()
        assert process.wait(60) == 0 and "Traceback" not in "".join(said), said


@pytest.fixture(scope="session")
def loaded(taught):
    return dsjax.load(taught)


@pytest.fixture(scope="session")
def logprobs(loaded):
    """Logprobs [T - 1] of all tokens but the first, by the model's forward pass."""

    def compute(ids: list[int]) -> np.ndarray:
        row = np.zeros((1, 128), np.int32)  # one shape for all: attention is causal
        row[0, : len(ids)] = ids
        logits = dsjax.logits(loaded, row)[0, : len(ids) - 1].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return logp[np.arange(len(ids) - 1), ids[1:]]

    return compute
