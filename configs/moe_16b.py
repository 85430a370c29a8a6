"""moe_16b: DeepSeekMoE-16B (arXiv:2401.06066, section 5.1): plain multi-head attention, softmax router."""

from dsjax.config import BalanceConfig, ComputeConfig, Config, ModelConfig, OptimizerConfig


def moe_16b() -> Config:
    return Config(
        name="moe_16b",
        steps=106_449,  # as published: 2T tokens
        batch_size=4608,
        seq_len=4096,
        eval_every=1000,
        checkpoint_every=1000,
        model=ModelConfig(
            vocab_size=102_400,
            hidden_size=2048,
            intermediate_size=10_944,
            moe_intermediate_size=1408,
            num_hidden_layers=28,
            num_attention_heads=16,
            attention="mha",
            qk_nope_head_dim=0,
            qk_rope_head_dim=128,
            v_head_dim=128,
            n_routed_experts=64,
            n_shared_experts=2,
            num_experts_per_tok=6,
            first_k_dense_replace=1,
            scoring_func="softmax",
            topk_method="greedy",
            norm_topk_prob=False,
            max_position_embeddings=4096,
            initializer_range=0.006,
        ),
        balance=BalanceConfig(expert=0.001),
        optimizer=OptimizerConfig(
            peak_lr=4.2e-4,
            warmup_steps=2000,
            schedule="step",
            step_at=(0.8 * 106_449 * 4608 * 4096, 0.9 * 106_449 * 4608 * 4096),  # at 80% and 90% of the steps
            eps=1e-8,  # not published
        ),
        compute=ComputeConfig(precision="bf16", remat="deepseek"),
    )
