"""v3: DeepSeek-V3 (arXiv:2412.19437, sections 3.2, 3.3 and 4.2): sigmoid router balanced by a bias, MTP, FP8, 14.8T
tokens.

Its context was extended twice (section 4.3), with YaRN from the first extension on.
"""

from dsjax.config import (
    BalanceConfig,
    ComputeConfig,
    Config,
    DataConfig,
    ModelConfig,
    MtpConfig,
    OptimizerConfig,
    Phase,
    RopeScaling,
)


def v3() -> Config:
    return Config(
        name="v3",
        steps=247_199,  # 14.8T tokens
        batch_size=15_360,
        accumulate=5,  # the batch grows in five steps of 3072 rows; the ramp's shape was not published
        seq_len=4096,
        batch_size_start=3072,
        batch_ramp_tokens=469_000_000_000,
        eval_every=1000,
        checkpoint_every=1000,
        model=ModelConfig(
            vocab_size=129_280,
            hidden_size=7168,
            intermediate_size=18_432,
            moe_intermediate_size=2048,
            num_hidden_layers=61,
            num_nextn_predict_layers=1,
            num_attention_heads=128,
            q_lora_rank=1536,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            n_routed_experts=256,
            n_shared_experts=1,
            num_experts_per_tok=8,
            first_k_dense_replace=3,
            n_group=8,
            topk_group=4,
            scoring_func="sigmoid",
            topk_method="noaux_tc",
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
            # As released. Pre-training ran at 4K without YaRN: --phase=pretrain
            rope_scaling=RopeScaling(factor=40),
            max_position_embeddings=163_840,
            initializer_range=0.006,
        ),
        balance=BalanceConfig(sequence=1e-4, bias_update_speed=0.001, bias_update_until=14.3e12),
        mtp=MtpConfig(loss_weight=0.3, loss_weight_final=0.1, switch_at=10e12),
        optimizer=OptimizerConfig(
            peak_lr=2.2e-4,
            warmup_steps=2000,
            schedule="phases",
            phases=(
                Phase("constant", until=10e12, rate=1),
                Phase("cosine", until=14.3e12, rate=2.2e-5 / 2.2e-4),
                Phase("constant", until=14.633e12, rate=2.2e-5 / 2.2e-4),
                Phase("constant", until=14.8e12, rate=7.3e-6 / 2.2e-4),
            ),
            eps=1e-8,  # not published
            moments_dtype="bfloat16",
            ema_decay=0.999,  # the average was kept; its decay was not published
            ema_on="host",
        ),
        data=DataConfig(fim_rate=0.1, document_mask=False),  # rows are packed, and attention crosses documents
        compute=ComputeConfig(precision="fp8_deepseek", remat="deepseek"),
    )


_EXTENSION = {
    "steps": 1000,
    "batch_size_start": None,
    "batch_ramp_tokens": 0,
    "eval_every": 100,
    "checkpoint_every": 100,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 0,  # not published
    "optimizer.peak_lr": 7.3e-6,  # the last of pre-training
    "balance.bias_update_speed": 0.0,  # this and the next are pre-training's last, as nothing else was published
    "mtp.loss_weight": 0.1,
}
PHASES = {
    "pretrain": {"model.rope_scaling": None, "model.max_position_embeddings": 4096},
    "32k": _EXTENSION | {"seq_len": 32_768, "batch_size": 1920},
    "128k": _EXTENSION | {"seq_len": 131_072, "batch_size": 480},
}
