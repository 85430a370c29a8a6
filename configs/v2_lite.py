"""v2_lite: DeepSeek-V2-Lite (arXiv:2405.04434, appendix B): MLA without query compression, greedy softmax router."""

from dsjax.config import BalanceConfig, ComputeConfig, Config, ModelConfig, OptimizerConfig, RopeScaling


def v2_lite() -> Config:
    return Config(
        name="v2_lite",
        steps=301_997,  # 5.7T tokens
        batch_size=4608,
        seq_len=4096,
        eval_every=1000,
        checkpoint_every=1000,
        model=ModelConfig(
            vocab_size=102_400,
            hidden_size=2048,
            intermediate_size=10_944,
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
            scoring_func="softmax",
            topk_method="greedy",
            norm_topk_prob=False,
            # As released. Pre-training ran at 4K without YaRN: --model.rope-scaling=none
            rope_scaling=RopeScaling(factor=40, mscale=0.707, mscale_all_dim=0.707),
            max_position_embeddings=163_840,
            initializer_range=0.006,
        ),
        balance=BalanceConfig(expert=0.001),
        optimizer=OptimizerConfig(
            peak_lr=4.2e-4,
            warmup_steps=2000,
            schedule="step",
            step_at=(0.8 * 5.7e12, 0.9 * 5.7e12),
            eps=1e-8,  # not published
        ),
        compute=ComputeConfig(precision="bf16", remat="deepseek"),
    )
