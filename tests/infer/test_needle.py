"""Needles: where they lie, what is asked and what counts, exactly."""

import json

import jax
import models
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.config import Config, ConfigError, RopeScaling, replace
from dsjax.data.tokenizer import bytes_tokenizer
from dsjax.hub.load import Loaded, logits
from dsjax.infer import needle
from dsjax.infer.needle import Needle, hide
from sharding.mesh import make_mesh

TOKENIZER = bytes_tokenizer()
HAY = np.arange(1000, 3000)  # no token of a needle is among them
TOKENS = st.lists(st.integers(10, 99), min_size=1, max_size=12)


@given(
    st.tuples(TOKENS, TOKENS, TOKENS),
    st.integers(80, 2000),
    st.floats(0, 1),
    st.lists(st.tuples(st.floats(0, 1), st.lists(st.integers(100, 199), min_size=1, max_size=4)), max_size=4),
)
def test_length_depth_question_and_answer_are_exact(parts, length, depth, others):
    asks, answer, ends = parts
    row, start = hide(HAY, parts, length, depth, bos=1, others=others)
    assert (len(row), row[0], row.dtype) == (length, 1, np.int32)
    assert row[start:].tolist() == answer
    assert row[start - len(asks) : start].tolist() == asks
    body = row[1 : start - len(asks)].tolist()
    hay = [token for token in body if token >= 1000]
    assert hay == HAY[: len(hay)].tolist()  # the text goes on where the needle ends
    first = next(i for i, token in enumerate(body) if token < 100)
    line = [*asks, *answer, *ends]
    assert body[first : first + len(line)] == line
    assert sum(token >= 1000 for token in body[:first]) == round(depth * len(hay))
    assert sum(100 <= token < 200 for token in body) == sum(len(tokens) for _, tokens in others)
    assert len(hay) + len(line) + sum(len(tokens) for _, tokens in others) == len(body)


def test_a_row_without_room_says_what_it_needs():
    parts = [1] * 5, [2] * 3, [3]
    with pytest.raises(ConfigError, match=r"^--lengths=18: expected at least 19, for the needles and one more token$"):
        hide(HAY, parts, 18, 0.5, bos=1)
    assert len(hide(HAY, parts, 19, 0.5, bos=1)[0]) == 19


@pytest.mark.parametrize(
    "text", ["", "{key:3}", "{value:3}{key:3}", "{key}{value}", "{key:0} {value:1}", "{key:1} {value:1} {value:2}"]
)
def test_a_needle_without_key_or_value_is_refused(text):
    with pytest.raises(ConfigError, match=r"^--needle=.*: expected a text with \{key:N\} and, behind it, \{value:N\}$"):
        Needle.parse(text)


def test_a_needle_asks_with_its_own_beginning():
    line = Needle.parse(needle.NEEDLE)
    ((key, value),) = line.draw(np.random.default_rng(0), 1)
    assert (len(key), len(value)) == (4, 4) and key.isalpha() and value.isdigit()
    asks, answer, ends = (TOKENIZER.decode(ids) for ids in line.encode(TOKENIZER, key, value))
    assert (asks, answer, ends) == (f"\nThe code of {key} is", f" {value}", ".\n")
    keys = [key for key, _ in Needle.parse("{key:1}{value:1}").draw(np.random.default_rng(0), 26)]
    assert len(set(keys)) == 26
    ((key, value),) = Needle.parse("{key:2:AB}{value:3:xy}").draw(np.random.default_rng(0), 1)
    assert set(key) <= set("AB") and len(key) == 2 and set(value) <= set("xy") and len(value) == 3
    with pytest.raises(ConfigError, match=r"^--others=26: expected less than the 26 keys of 1 of ABC"):
        Needle.parse("{key:1}{value:1}").draw(np.random.default_rng(0), 27)


@pytest.fixture(scope="module")
def loaded():
    """A drawn model that reads 128 positions, as `load` gives it."""
    mesh = make_mesh(jax.devices()[:1])
    cfg = models.v3(vocab_size=262, num_hidden_layers=1, num_nextn_predict_layers=0, max_position_embeddings=128)
    config = Config(name="drawn", seq_len=64, model=cfg, compute=models.COMPUTE)
    with jax.set_mesh(mesh):
        model, bias = models.draw(cfg)
    found = Loaded(model, bias, mesh, config, None)
    vars(found)["tokenizer"] = TOKENIZER
    return found


def test_the_score_is_the_share_of_likeliest_tokens_in_the_answers_places(loaded, monkeypatch, tmp_path):
    seen = []

    def knows_the_first_digit(model, batch, bias, most, compute):
        rows = np.asarray(batch.tokens)
        seen.append(rows.shape)
        assert most == 2
        return np.where(np.arange(most) == 0, rows[:, -most:], 0)

    monkeypatch.setattr(needle, "_guesses", knows_the_first_digit)
    options = {"trials": 3, "needle": "@{key:1}{value:2};", "others": 2, "text": "some text " * 50}
    result = needle.search(loaded, [128, 64], [0.0, 1.0], **options)
    assert result["share"] == [[0.5, 0.5]] * 2 and result["exact"] == [[0.0, 0.0]] * 2
    assert result["lengths"] == [64, 128] and result["trained_length"] == 64
    assert seen == [(6, 64), (6, 128)]  # one shape a length
    json.dumps(result)
    needle.draw([result, result], tmp_path / "needle.png")
    assert (tmp_path / "needle.png").stat().st_size > 5000
    head, rows = needle.table(result)
    assert head == ["depth", "64", "128"] and rows[-1] == ("mean", "50%", "50%")
    with pytest.raises(ConfigError, match=r"^--lengths=256: expected at most model.max_position_embeddings=128$"):
        needle.search(loaded, [64, 256], **options)


def test_the_likeliest_tokens_are_those_of_the_logits(loaded):
    rows = np.random.default_rng(0).integers(262, size=(2, 64)).astype(np.int32)
    with jax.set_mesh(loaded.mesh):
        batch = needle._batch(rows)
        guesses = needle._guesses(loaded.model, batch, loaded.router_bias, 3, models.COMPUTE)
    best = np.argmax(logits(loaded, rows), axis=-1)
    np.testing.assert_array_equal(guesses, best[:, -4:-1])


def test_a_stretched_model_is_the_same_weights_with_another_rope(loaded):
    yarn = RopeScaling(factor=4, original_max_position_embeddings=64)
    cfg = replace(loaded.config.model, rope_scaling=yarn, max_position_embeddings=512)
    longer = needle.stretched(loaded, cfg)
    assert longer.model.cfg == longer.config.model == cfg and loaded.model.cfg.rope_scaling is None
    assert longer.model.dense.attn.cfg == cfg
    assert models.named_leaves(longer.model).keys() == models.named_leaves(loaded.model).keys()
    assert needle.trained_length(longer) == 64


@settings(max_examples=20)
@given(st.integers(2, 200_000))
def test_default_lengths_rise_to_the_context(limit):
    lengths = needle.default_lengths(limit)
    assert lengths == sorted(lengths) and lengths[-1] == min(limit, 4096) and lengths[0] >= 1
