"""Generation: the same text for the same seed, whatever way it is asked for."""

import functools
from pathlib import Path

import jax
import models
import numpy as np
import pytest

from dsjax.config import Config, ConfigError
from dsjax.data.tokenizer import bytes_tokenizer
from dsjax.hub.load import Loaded
from dsjax.infer import generate
from sharding.mesh import make_mesh

CFG = models.v3(num_hidden_layers=2, max_position_embeddings=64, vocab_size=264)
TOKENIZER = bytes_tokenizer()


@functools.cache
def loaded() -> Loaded:
    mesh = make_mesh(jax.devices()[:1])
    with jax.set_mesh(mesh):
        model, bias = models.draw(CFG)
    return Loaded(model, bias, mesh, Config(model=CFG, seq_len=64, compute=models.COMPUTE), Path())


def pieces(prompt="ab", **options) -> list[str]:
    it = loaded()
    with jax.set_mesh(it.mesh):
        options = {"max_tokens": 20, "temperature": 1.0, "seed": 1} | options
        return list(generate.continue_text(it.model, it.router_bias, TOKENIZER, it.config, prompt, **options))


def test_a_text_comes_in_pieces_and_is_that_of_its_tokens():
    got = pieces()
    assert len(got) > 1 and got == pieces() and got != pieces(seed=2)
    tokens = generate.generate_tokens(loaded(), [[0, *TOKENIZER.encode("ab")]], max_tokens=20, seed=1)
    assert "".join(got) == TOKENIZER.decode(tokens[0])


def test_many_prompts_at_once_are_what_they_are_alone():
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5, 8]]
    both = generate.generate_tokens(loaded(), prompts, max_tokens=9, temperature=0.0)
    assert np.array(both).shape == (2, 9)
    for prompt, text in zip(prompts, both):
        assert generate.generate_tokens(loaded(), [prompt], max_tokens=9, temperature=0.0) == [text]


def test_a_text_that_is_too_long_is_refused():
    with pytest.raises(ConfigError, match=r"^max_tokens=62: expected at most 61 after a prompt of 3 tokens"):
        pieces(max_tokens=62)
