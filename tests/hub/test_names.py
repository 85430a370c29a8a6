"""The table of names: every number of ours comes from one place of the Hub's, and goes back there."""

import checkpoints
import jax
import numpy as np
import pytest
from flax import nnx

import configs
from dsjax.hub.names import hub_tensors
from dsjax.model.transformer import DeepSeek, init_router_bias
from dsjax.precision import weight_name


@pytest.mark.parametrize("kind", checkpoints.KINDS)
def test_every_number_of_ours_comes_from_one_tensor(kind, one_device):
    cfg = checkpoints.KINDS[kind]
    state = {"model": DeepSeek(cfg, rngs=nnx.Rngs(0)), "router_bias": init_router_bias(cfg)}
    abstract = jax.eval_shape(lambda: state)
    counts = {weight_name(path): np.zeros(a.shape, int) for path, a in jax.tree_util.tree_leaves_with_path(abstract)}
    for t in hub_tensors(cfg):
        if not t.copy:
            assert counts[t.leaf][t.index].shape == t.part, t.name
            counts[t.leaf][t.index] += 1
    for leaf, count in counts.items():
        wanted = 0 if leaf.startswith("router_bias") and cfg.topk_method != "noaux_tc" else 1
        assert np.all(count == wanted), leaf


@pytest.mark.parametrize("kind", checkpoints.KINDS)
def test_there_and_back_is_the_same_and_slices_are_slices_of_the_whole(kind):
    rng = np.random.default_rng(0)
    for t in hub_tensors(checkpoints.KINDS[kind]):
        a = rng.normal(size=t.shape)
        ours = t.to_ours(a)
        assert ours.shape == t.part
        np.testing.assert_array_equal(t.to_hub(ours), a, err_msg=t.name)
        place = [slice(0, n) for n in t.part]
        for axis in {0, t.row_axis}:
            half = list(place)
            half[axis] = slice(t.part[axis] // 2, t.part[axis])
            np.testing.assert_array_equal(t.to_ours(a[t.file_slices(tuple(half))]), ours[tuple(half)], err_msg=t.name)


@pytest.mark.parametrize(("preset", "tensors"), [("v3", 91_991)])
def test_v3_has_the_published_number_of_tensors(preset, tensors):
    """Reference section 10.4; FP8 scales are counted."""
    all_ = hub_tensors(configs.load(preset).model)
    assert len(all_) + sum(t.fp8 for t in all_) == tensors


def test_v3_tensors_have_the_published_shapes():
    shapes = {t.name.removeprefix("model.layers."): t.shape for t in hub_tensors(configs.load("v3").model)}
    for name, shape in {  # reference sections 10.2 and 4.2
        "3.self_attn.q_a_proj.weight": (1536, 7168),
        "3.self_attn.q_b_proj.weight": (24576, 1536),
        "3.self_attn.kv_a_proj_with_mqa.weight": (576, 7168),
        "3.self_attn.kv_b_proj.weight": (32768, 512),
        "3.self_attn.o_proj.weight": (7168, 16384),
        "0.mlp.down_proj.weight": (7168, 18432),
        "60.mlp.experts.255.down_proj.weight": (7168, 2048),
        "60.mlp.gate.weight": (256, 7168),
        "61.eh_proj.weight": (7168, 14336),
        "61.embed_tokens.weight": (129280, 7168),
        "61.shared_head.head.weight": (129280, 7168),
        "61.mlp.gate.e_score_correction_bias": (256,),
    }.items():
        assert shapes[name] == shape, name


def test_halves_become_pairs():
    """DeepSeekMoE turns (x_i, x_{i + half}); ours are neighbours."""
    t = next(t for t in hub_tensors(checkpoints.MOE) if t.name.endswith("q_proj.weight"))
    head = np.arange(8.0)  # the first head's rows in the file
    weight = np.concatenate([head, head + 8])[:, None] * np.ones((1, 16))
    assert t.to_ours(weight)[0, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
