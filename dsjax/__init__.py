"""The DeepSeek system in JAX and Flax.

    model = dsjax.load("runs/tiny")        # or a Hub folder
    dsjax.logits(model, tokens)            # [B, T] int -> [B, T, V] float32

The other parts are imported by name: `from dsjax.model.transformer import DeepSeek`.
"""

__version__ = "0.1.0"
__all__ = ["load", "logits"]


def __getattr__(name: str):
    if name in __all__:  # on first use: they bring Flax and Orbax, which take seconds
        from dsjax.hub import load

        return getattr(load, name)
    raise AttributeError(f"module 'dsjax' has no attribute {name!r}")
