"""Multi-token prediction: what it reads, where it stops, probed with gradients."""

import functools

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.config import replace
from dsjax.model.mtp import look_ahead, shift_left
from dsjax.train.loss import cross_entropy, next_targets

pytestmark = pytest.mark.usefixtures("one_device")

DEPTH = 2
CFG = models.v3(num_hidden_layers=2, num_nextn_predict_layers=DEPTH)
FIRST, SECOND = 7, 6  # lengths of two documents in one row; their tokens are all different


@functools.cache
def two_documents():
    batch = models.pack([[FIRST, SECOND]])
    tokens = np.zeros((1, 16), np.int32)
    tokens[0, : FIRST + SECOND] = np.arange(1, FIRST + SECOND + 1)
    return batch.replace(tokens=jax.device_put(tokens, batch.tokens.sharding))


@jax.jit
def gradient(model, bias, batch, depth_weights, document):
    """Of the MTP losses of one document's positions, weighted by depth, by everything in the model."""

    def loss(model):
        out = model(batch, bias, models.COMPUTE)
        total = 0.0
        for k, hidden in enumerate(out.mtp_hidden):
            targets, valid = next_targets(batch, k + 2)
            valid = valid & (batch.segment_ids == document)
            total += depth_weights[k] * cross_entropy(hidden, model.head[...], targets, valid)
        return total

    return jax.grad(loss)(model)


@pytest.mark.parametrize("depth", range(1, DEPTH + 1))
def test_a_documents_mtp_loss_reads_every_token_of_its_own_and_none_of_the_other(depth):
    model, bias = models.draw(CFG)
    weights = jnp.eye(DEPTH)[depth - 1]
    for document, start, length in ((1, 0, FIRST), (2, FIRST, SECOND)):
        of_model = gradient(model, bias, two_documents(), weights, document)
        by_token = np.abs(np.asarray(of_model.embed[...])).max(axis=1)
        own = by_token[1 + start : 1 + start + length]
        # Its last token is only a label: reading it would predict a token past the end.
        assert np.all(own[:-1] > 0)
        assert own[-1] == 0
        assert np.count_nonzero(by_token) == length - 1


def test_every_mtp_weight_has_a_gradient():
    model, bias = models.draw(CFG)
    of_model = gradient(model, bias, two_documents(), jnp.ones(DEPTH), 1)
    names = [name for name in models.named_leaves(model) if name.startswith("mtp_")]
    leaves = models.named_leaves(of_model)
    assert len(names) > 15
    for name in names:
        of_depth = np.abs(leaves[name]).reshape(DEPTH, -1).max(axis=1)
        assert np.all(of_depth > 0), name


@given(st.lists(st.lists(st.integers(1, 5), max_size=4), min_size=2, max_size=2), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_labels_end_where_their_document_ends(rows, n):
    rows = [row if sum(row) <= 8 else row[:1] for row in rows]
    batch = models.pack(rows, 8)
    tokens, segments = np.asarray(batch.tokens), np.asarray(batch.segment_ids)
    labels, valid = (np.asarray(a) for a in next_targets(batch, n))
    for b in range(2):
        for i in range(8):
            inside = segments[b, i] > 0 and i + n < 8 and segments[b, i + n] == segments[b, i]
            assert valid[b, i] == inside
            if inside:
                assert labels[b, i] == tokens[b, i + n]


def test_look_ahead_hides_tokens_of_other_documents():
    tokens, segment_ids = look_ahead(two_documents(), 2)
    np.testing.assert_array_equal(segment_ids[0], [1] * 5 + [0, 0] + [2] * 4 + [0] * 5)
    np.testing.assert_array_equal(tokens[0], [3, 4, 5, 6, 7, 0, 0, 10, 11, 12, 13, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(shift_left(tokens, 99), 0)


def test_the_embedding_comes_first_and_both_are_normed():
    model, _ = models.draw(CFG)
    read = jax.tree.map(lambda a: a[0], model.mtp_input)
    w = models.named_leaves(read)
    rng = np.random.default_rng(0)
    embedding, hidden = (rng.normal(size=(1, 3, CFG.hidden_size)).astype(np.float32) for _ in range(2))

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + CFG.rms_norm_eps) * scale

    both = np.concatenate([norm(embedding, w["enorm/scale"]), norm(hidden, w["hnorm/scale"])], axis=-1)
    got = read(jnp.asarray(embedding), jnp.asarray(hidden))
    np.testing.assert_allclose(got, both @ w["eh_proj"], atol=1e-5)


def test_the_option_chooses_the_hidden_state_before_or_after_the_final_norm():
    model, bias = models.draw(CFG)

    @jax.jit
    def forward(model, batch, norm_scale):
        model = swap_final_norm(model, norm_scale)
        out = model(batch, bias, models.COMPUTE)
        return out.hidden, out.mtp_hidden[0]

    pre_norm = with_cfg(CFG, mtp_hidden="pre_norm")
    ones, other = jnp.ones(CFG.hidden_size), jnp.asarray(np.linspace(0.5, 2, CFG.hidden_size), jnp.float32)
    post = [forward(model, two_documents(), scale) for scale in (ones, other)]
    pre = [forward(pre_norm, two_documents(), scale) for scale in (ones, other)]
    np.testing.assert_array_equal(post[0][0], pre[0][0])  # the trunk is the same
    assert not np.allclose(post[0][1], post[1][1])  # after the norm: its scale is seen
    np.testing.assert_array_equal(pre[0][1], pre[1][1])  # before it: it is not
    assert not np.allclose(post[1][1], pre[1][1])


def with_cfg(cfg, **changes):
    return models.draw(replace(cfg, **changes))[0]


def swap_final_norm(model, scale):
    def swap(path, leaf):
        return scale if models.weight_name(path) == "norm/scale" else leaf

    return jax.tree_util.tree_map_with_path(swap, model)
