"""Closed forms against the papers' and the released checkpoints' numbers."""

import pytest

import configs
from dsjax.config import ModelConfig, replace
from dsjax.plan import count


def model(name: str) -> ModelConfig:
    if name in configs.PRESETS:
        return configs.load(name).model
    moe_16b = model("moe_16b")
    if name == "moe_2b":
        return replace(
            moe_16b, vocab_size=8000, hidden_size=1280, num_hidden_layers=9, num_attention_heads=10,
            first_k_dense_replace=0, n_routed_experts=63, n_shared_experts=1, num_experts_per_tok=7,
            moe_intermediate_size=853,
        )  # fmt: skip
    return replace(  # moe_145b
        moe_16b, hidden_size=4096, num_hidden_layers=62, num_attention_heads=32, intermediate_size=21_888,
        n_routed_experts=128, n_shared_experts=4, num_experts_per_tok=12,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("moe_2b", 1_966_912_000),
        ("moe_16b", 16_375_728_128),
        ("v2_lite", 15_706_484_224),
        ("v2", 235_741_434_880),
        ("v3", 671_026_419_200),
        ("r1", 671_026_419_200),
        ("moonlight", 15_960_110_208),
        ("kimi_k2", 1_026_408_232_448),
    ],
)
def test_total_is_exact(name, total):
    assert count.parameters(model(name)).total == total


def test_the_145b_model_matches_its_paper():
    assert count.parameters(model("moe_145b")).total == pytest.approx(144.61e9, abs=0.005e9)


@pytest.mark.parametrize(
    ("name", "body", "body_head", "body_embed_head"),
    [  # in billions, as printed in the reference
        ("moe_2b", 0.296, 0.306, 0.316),
        ("moe_16b", 2.409, 2.619, 2.829),
        ("moe_145b", 21.35, 21.77, 22.19),
        ("v2_lite", 2.242, 2.451, 2.661),
        ("v2", 20.327, 20.852, 21.376),
        ("v3", 35.699, 36.626, 37.552),
        ("moonlight", 2.244, 2.579, 2.915),
        ("kimi_k2", 30.51, 31.69, 32.86),
    ],
)
def test_activated_in_the_three_conventions(name, body, body_head, body_embed_head):
    got = count.parameters(model(name))
    digits = 2 if body > 21 and name != "v3" else 3
    assert round(got.active_body / 1e9, digits) == body
    assert round(got.active_body_head / 1e9, digits) == body_head
    assert round(got.active_body_embed_head / 1e9, digits) == body_embed_head


def test_mtp_adds_what_the_v3_checkpoint_holds():
    assert count.parameters(model("v3")).mtp == 11_610_068_224
    assert count.mtp_parameters(replace(model("v3"), num_nextn_predict_layers=2)) == 2 * 11_610_068_224
    assert count.parameters(model("moonlight")).mtp == 0


def test_the_v3_hub_repository_is_trunk_mtp_and_a_second_embedding_and_head():
    v3 = count.parameters(model("v3"))
    embedding = 129_280 * 7168
    assert v3.total + v3.mtp + 2 * embedding == 684_489_845_504


def test_router_biases_are_what_state_dicts_call_buffers():
    assert count.router_biases(model("v3")) == 58 * 256 == 14_848
    assert count.parameters(model("v3")).total - count.router_biases(model("v3")) == 671_026_404_352
    assert count.router_biases(model("v2")) == 0


def test_parts_of_a_layer_are_exact():
    v3, v2, lite = model("v3"), model("v2"), model("v2_lite")
    assert count.attention_parameters(v3) == 187_107_328
    assert count.moe_parameters(v3, 256) == 11_320_164_608
    assert count.dense_parameters(v3) == 396_361_728
    assert (count.attention_parameters(v2), count.moe_parameters(v2, 160)) == (149_227_520, 3_822_878_720)
    assert (count.attention_parameters(lite), count.moe_parameters(lite, 64)) == (13_763_072, 571_080_704)


@pytest.mark.parametrize(("name", "elements"), [("v2_lite", 15_552), ("v2", 34_560), ("v3", 35_136), ("r1", 35_136)])
def test_the_latent_cache_is_as_published(name, elements):
    assert count.cache(model(name)).own == elements


def test_the_cache_beside_other_attentions():
    v3 = count.cache(model("v3"))
    assert v3.own * count.BYTES == 70_272
    assert v3.mha == 1_998_848
    assert round(v3.mha / v3.own, 1) == 56.9
    assert v3.gqa8 == 2 * 8 * 128 * 61
    assert count.cache(model("v2_lite")).mha == 110_592  # V2, Table 9: 110.6K
    moe = count.cache(model("moe_16b"))
    assert moe.own == moe.mha == 2 * moe.gqa8
    assert count.cache(model("tiny")).gqa8 == count.cache(model("tiny")).mha  # four heads make no eight groups


def test_v2_keeps_as_much_as_gqa_with_two_and_a_quarter_groups():
    assert count.cache(model("v2")).own == 2.25 * 2 * 128 * 60


def test_flops_a_token_are_as_published():
    assert round(count.train_flops(model("v3"), 4096) / 1e9, 1) == 250.5
    assert round(count.train_flops(model("v3"), 4096, causal=False) / 1e9, 1) == 281.2
    assert round(count.train_flops(model("v2"), 4096) / 1e9) == 155


def test_the_summary_holds_the_same_numbers():
    row = count.summary(configs.load("v3"))
    assert row["parameters"]["total"] == 671_026_419_200
    assert row["cache_bytes_per_token"] == {"own": 70_272, "mha": 3_997_696, "gqa8": 249_856}
    assert row["train_flops_per_token"]["seq_len"] == 4096
