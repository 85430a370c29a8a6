"""v2: DeepSeek-V2 (arXiv:2405.04434, section 3.1): MLA, device-limited softmax router, three balance losses."""

from dsjax.config import BalanceConfig, ComputeConfig, Config, ModelConfig, OptimizerConfig, RopeScaling


def v2() -> Config:
    return Config(
        name="v2",
        steps=223_187,  # 8.1T tokens
        batch_size=9216,
        accumulate=4,  # the batch grows 2304, 4608, 6912, 9216; the ramp's shape was not published
        seq_len=4096,
        batch_size_start=2304,
        batch_ramp_tokens=225_000_000_000,
        eval_every=1000,
        checkpoint_every=1000,
        model=ModelConfig(
            vocab_size=102_400,
            hidden_size=5120,
            intermediate_size=12_288,
            moe_intermediate_size=1536,
            num_hidden_layers=60,
            num_attention_heads=128,
            q_lora_rank=1536,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            n_routed_experts=160,
            n_shared_experts=2,
            num_experts_per_tok=6,
            first_k_dense_replace=1,
            n_group=8,
            topk_group=3,
            scoring_func="softmax",
            topk_method="group_limited_greedy",
            norm_topk_prob=False,
            routed_scaling_factor=16.0,
            # As released. Pre-training ran at 4K without YaRN: --phase=pretrain
            rope_scaling=RopeScaling(factor=40, mscale=0.707, mscale_all_dim=0.707),
            max_position_embeddings=163_840,
            initializer_range=0.006,
        ),
        balance=BalanceConfig(expert=0.003, device=0.05, communication=0.02, n_devices=8),
        optimizer=OptimizerConfig(
            peak_lr=2.4e-4,
            warmup_steps=2000,
            schedule="step",
            step_at=(0.6 * 8.1e12, 0.9 * 8.1e12),
            eps=1e-8,  # not published
        ),
        compute=ComputeConfig(precision="bf16", remat="deepseek"),
    )


PHASES = {
    "pretrain": {"model.rope_scaling": None, "model.max_position_embeddings": 4096},
    "32k": {  # section 3.1.4; it evaluates well to 128K after this one phase
        "steps": 1000,
        "seq_len": 32_768,
        "batch_size": 576,
        "batch_size_start": None,
        "batch_ramp_tokens": 0,
        "eval_every": 100,
        "checkpoint_every": 100,
        "optimizer.schedule": "constant",  # this and the next two were not published: pre-training's last rate
        "optimizer.warmup_steps": 0,
        "optimizer.peak_lr": 2.4e-4 * 0.316**2,
    },
}
