"""tiny: every part of DeepSeek-V3 at a size that a laptop's CPU trains in minutes."""

from dsjax.config import BalanceConfig, Config, ModelConfig, OptimizerConfig


def tiny() -> Config:
    return Config(
        name="tiny",
        steps=300,
        eval_every=100,
        checkpoint_every=100,
        batch_size=8,
        seq_len=256,
        model=ModelConfig(
            vocab_size=4096,
            hidden_size=128,
            intermediate_size=384,
            moe_intermediate_size=96,
            num_hidden_layers=4,
            num_nextn_predict_layers=1,
            num_attention_heads=4,
            q_lora_rank=64,
            kv_lora_rank=64,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
            n_routed_experts=16,
            n_shared_experts=1,
            num_experts_per_tok=4,
            first_k_dense_replace=1,
            n_group=4,
            topk_group=2,
            scoring_func="sigmoid",
            topk_method="noaux_tc",
            norm_topk_prob=True,
            routed_scaling_factor=1.99,  # Moonlight's recipe: mean of 1/|p| over top-4 of 16 random scores
            max_position_embeddings=4096,
            initializer_range=0.02,
        ),
        balance=BalanceConfig(sequence=1e-4),
        optimizer=OptimizerConfig(peak_lr=4e-3, warmup_steps=30, schedule="cosine"),
    )
