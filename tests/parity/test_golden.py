"""Every kind of model against the numbers that transformers gave for it, which lie in golden/. Needs no torch."""

import functools

import kinds
import make_golden
import numpy as np
import pytest
from kinds import KINDS

from dsjax.hub.load import load, logits

# Compiling is what these cost: gradients and decoding of the kinds that differ most, all of them with -m slow.
SLOW = [pytest.param(kind, marks=() if kind in ("v3", "moe-16b") else pytest.mark.slow) for kind in KINDS]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """By kind: our model of the drawn weights, and the kept numbers."""

    @functools.cache
    def read(kind: str):
        values, expected = make_golden.read(kind)
        tensors = kinds.draw(values["config"])
        assert kinds.fingerprint(tensors) == values["weights"], "the weights are not those that the numbers are of"
        folder = kinds.write_folder(tmp_path_factory.mktemp("hub") / kind, values["config"], tensors)
        return load(folder, dtype="float32"), values, expected

    return read


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_kept_ones(model, kind):
    loaded, values, expected = model(kind)
    worst = kinds.check_logits(logits(loaded, np.array(values["tokens"])), expected)
    print(f"{kind}: logits within {worst:.1e}")


@pytest.mark.parametrize("kind", SLOW)
def test_loss_and_norms_of_gradients_are_the_kept_ones(model, kind):
    loaded, values, _ = model(kind)
    loss, gradients = kinds.loss_and_gradients(loaded, np.array(values["tokens"]))
    kinds.check_loss(loss, values["loss"])
    assert kinds.norms(gradients) == pytest.approx(values["gradient_norms"], rel=1e-3)


@pytest.mark.parametrize("kind", SLOW)
def test_greedy_tokens_are_the_kept_ones(model, kind):
    loaded, values, _ = model(kind)
    assert kinds.greedy(loaded, np.array(values["tokens"])) == values["greedy"]
