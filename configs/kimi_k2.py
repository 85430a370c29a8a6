"""kimi_k2: Kimi-K2, 1T parameters (Moonshot AI): V3's network with 384 experts in one group and half the heads.

Trained with MuonClip (arXiv:2507.20534, section 2.5): Muon, and attention logits held down by scaling wq and wk, which
is left out here. `steps` ends where the cosine does; --steps=236929 goes on through the annealing of 400B tokens.
"""

from dsjax.config import BalanceConfig, ComputeConfig, Config, ModelConfig, OptimizerConfig, Phase, RopeScaling


def kimi_k2() -> Config:
    return Config(
        name="kimi_k2",
        steps=230_968,  # 15.5T tokens
        batch_size=16_384,  # 67M tokens
        seq_len=4096,
        eval_every=1000,
        checkpoint_every=1000,
        model=ModelConfig(
            vocab_size=163_840,
            hidden_size=7168,
            intermediate_size=18_432,
            moe_intermediate_size=2048,
            num_hidden_layers=61,
            num_attention_heads=64,
            q_lora_rank=1536,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            n_routed_experts=384,
            n_shared_experts=1,
            num_experts_per_tok=8,
            first_k_dense_replace=1,
            scoring_func="sigmoid",
            topk_method="noaux_tc",
            norm_topk_prob=True,
            routed_scaling_factor=2.827,
            rope_theta=50_000.0,
            # As released (Instruct). Pre-training ran at 4K without YaRN: --model.rope-scaling=none
            rope_scaling=RopeScaling(factor=32, beta_fast=1),
            max_position_embeddings=131_072,
            rms_norm_eps=1e-6,
            initializer_range=0.02,  # config.json's; the report gives none
        ),
        balance=BalanceConfig(bias_update_speed=0.001),  # neither a loss nor the speed was published
        optimizer=OptimizerConfig(
            name="muon",
            peak_lr=2e-4,
            warmup_steps=500,
            schedule="phases",
            phases=(
                Phase("constant", until=10e12, rate=1),
                Phase("cosine", until=15.5e12, rate=2e-5 / 2e-4),
                Phase("linear", until=15.9e12, rate=7e-6 / 2e-4),  # the annealing's shape was not published
            ),
            clip_norm=1.0,  # not published
        ),
        compute=ComputeConfig(precision="bf16", remat="deepseek"),
    )
