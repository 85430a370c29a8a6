"""moonlight: Moonlight-16B-A3B (Moonshot AI, arXiv:2502.16982, section 3.3): V2-Lite's size with V3's router, trained
with Muon.
"""

from dsjax.config import BalanceConfig, ComputeConfig, Config, ModelConfig, OptimizerConfig, Phase


def moonlight() -> Config:
    return Config(
        name="moonlight",
        steps=175_834,  # 5.7T tokens
        batch_size=4096,
        accumulate=2,  # the batch doubles at 200B tokens
        seq_len=8192,
        batch_size_start=2048,
        batch_ramp_tokens=200_000_000_000,
        eval_every=1000,
        checkpoint_every=1000,
        model=ModelConfig(
            vocab_size=163_840,
            hidden_size=2048,
            intermediate_size=11_264,
            moe_intermediate_size=1408,
            num_hidden_layers=27,
            num_attention_heads=16,
            q_lora_rank=None,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            n_routed_experts=64,
            n_shared_experts=2,
            num_experts_per_tok=6,
            first_k_dense_replace=1,
            scoring_func="sigmoid",
            topk_method="noaux_tc",
            norm_topk_prob=True,
            routed_scaling_factor=2.446,
            rope_theta=50_000.0,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            initializer_range=0.02,  # config.json's; the report gives none
        ),
        balance=BalanceConfig(bias_update_speed=0.001, bias_update_until=5.2e12),  # no loss was published
        optimizer=OptimizerConfig(
            name="muon",
            peak_lr=4.2e-4,
            warmup_steps=2000,  # to 33B tokens
            schedule="phases",
            phases=(
                Phase("cosine", until=5.2e12, rate=4.2e-5 / 4.2e-4),
                Phase("linear", until=5.2e12 + 100 * 4096 * 8192, rate=1e-4 / 4.2e-4),  # 100 steps
                Phase("linear", until=5.7e12, rate=0),
            ),
            clip_norm=1.0,  # not published; Muon's direction does not depend on the gradient's length
        ),
        compute=ComputeConfig(precision="bf16", remat="deepseek"),
    )
