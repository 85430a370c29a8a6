"""Every kind of model, randomly drawn, against Hugging Face transformers in float32. `-rP` shows the differences."""

import functools

import kinds
import make_golden
import numpy as np
import pytest
from kinds import KINDS

from dsjax.hub.load import load, logits

pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.23")
pytest.importorskip("safetensors")

import oracle


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """By kind: our model as save_pretrained wrote theirs, tokens with clear choices, and their numbers of them."""

    @functools.cache
    def make(kind: str):
        raw = KINDS[kind]
        model = oracle.randomise(oracle.build(raw), raw)
        tokens = oracle.clear_tokens(model, raw)
        folder = oracle.save(model, raw, tmp_path_factory.mktemp("hub") / kind)
        return load(folder, dtype="float32"), tokens, oracle.theirs(model, tokens)

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(pair, kind):
    ours, tokens, theirs = pair(kind)
    worst = kinds.check_logits(logits(ours, tokens), theirs.logits)
    print(f"{kind}: logits within {worst:.1e}")


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_every_gradient_are_those_of_transformers(pair, kind):
    ours, tokens, theirs = pair(kind)
    loss, gradients = kinds.loss_and_gradients(ours, tokens)
    off = kinds.check_loss(loss, theirs.loss)
    worst = kinds.check_gradients(gradients, theirs.gradients)
    print(f"{kind}: loss within {off:.1e}, {len(gradients)} gradients within {worst:.1e}, both relative")


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_transformers(pair, kind):
    ours, tokens, theirs = pair(kind)
    assert kinds.greedy(ours, tokens) == theirs.greedy


@pytest.mark.parametrize("kind", KINDS)
def test_golden_files_are_what_the_script_makes(kind):
    values, expected = make_golden.make(kind)
    kept, kept_logits = make_golden.read(kind)
    for name in ("config", "weights", "tokens", "greedy"):
        assert values[name] == kept[name], name
    kinds.check_loss(values["loss"], kept["loss"])
    assert values["gradient_norms"] == pytest.approx(kept["gradient_norms"], rel=1e-3)
    np.testing.assert_allclose(expected, kept_logits, rtol=0, atol=1e-4)
