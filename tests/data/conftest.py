"""A small corpus, tokenised once: documents of many lengths, a few longer than a row."""

import random

import pytest

from dsjax.config import DataConfig
from dsjax.data.pipeline import load_corpus

WORDS = ["def", "return", "self", "naïve", "日本", "🙂", "x =", "(1234)", "\n    ", "import", "\r\n", "\t"]


def write_texts(folder, n: int):
    folder.mkdir()
    draw = random.Random(0)
    for i in range(n):
        words = draw.choices(WORDS, k=draw.choice([3, 20, 60, 300]))
        (folder / f"{i:03}.txt").write_bytes(f"{i} {' '.join(words)}\n".encode())
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts") / "texts", 120)


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="session")
def corpus(texts, run_folder):
    config = DataConfig(sources=(str(texts),), heldout_fraction=0.1)
    return load_corpus(config, 320, run_folder, progress=False)
