"""What crosses the `context` axis for MLA: latents, not keys."""

import math
import re

import jax
import jax.numpy as jnp
import models
import numpy as np

from dsjax.model.rope import rope_tables
from sharding.mesh import make_mesh
from sharding.rules import spec

B, T = 2, 32
CFG = models.v3(num_attention_heads=4)


def test_latents_travel_and_not_the_keys_that_they_expand_to():
    with jax.set_mesh(make_mesh(jax.devices()[:4], context=4)):
        attention = jax.tree.map(lambda a: a[0], models.draw(CFG)[0].dense.attn)
        x = jax.device_put(np.ones((B, T, CFG.hidden_size), np.float32), spec("batch", "seq", None))
        segments, positions = (
            jax.device_put(a, spec("batch", "seq"))
            for a in (np.ones((B, T), np.int32), np.tile(np.arange(T, dtype=np.int32), (B, 1)))
        )

        def energy(x):
            return jnp.sum(attention(x, rope_tables(positions, CFG), segments) ** 2)

        program = jax.jit(jax.grad(energy)).lower(x).compile().as_text()
    latent = B * T * (CFG.kv_lora_rank + CFG.qk_rope_head_dim)
    keys = B * T * CFG.num_attention_heads * (CFG.qk_head_dim + CFG.v_head_dim)
    gathered, summed = (
        sum(math.prod(map(int, shape.split(","))) for shape in re.findall(rf"f32\[([\d,]+)\]\S* (?:{kind})\(", program))
        for kind in ("all-gather", "all-reduce|reduce-scatter")
    )
    assert gathered == latent < keys / 4  # forward; under jax.checkpoint, once more
    assert 0 < summed <= latent  # backward: gradients of the latents
