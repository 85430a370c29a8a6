"""small: about 100M parameters, 27M of them active; for one accelerator."""

from dsjax.config import BalanceConfig, ComputeConfig, Config, ModelConfig, OptimizerConfig


def small() -> Config:
    return Config(
        name="small",
        steps=10_000,
        batch_size=64,
        seq_len=1024,
        model=ModelConfig(
            vocab_size=8192,
            hidden_size=512,
            intermediate_size=1536,
            moe_intermediate_size=256,
            num_hidden_layers=8,
            num_nextn_predict_layers=1,
            num_attention_heads=8,
            q_lora_rank=256,
            kv_lora_rank=128,
            qk_nope_head_dim=64,
            qk_rope_head_dim=32,
            v_head_dim=64,
            n_routed_experts=32,
            n_shared_experts=1,
            num_experts_per_tok=4,
            first_k_dense_replace=1,
            n_group=8,
            topk_group=4,
            scoring_func="sigmoid",
            topk_method="noaux_tc",
            norm_topk_prob=True,
            routed_scaling_factor=2.0,  # Moonlight's recipe: mean of 1/|p| over top-4 of 32 random scores
            max_position_embeddings=4096,
            initializer_range=0.02,
        ),
        balance=BalanceConfig(sequence=1e-4),
        optimizer=OptimizerConfig(peak_lr=1e-3, warmup_steps=200, schedule="cosine"),
        compute=ComputeConfig(precision="bf16", remat="deepseek"),
    )
