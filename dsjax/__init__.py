"""The DeepSeek system in JAX and Flax.

The parts are imported by name: `from dsjax.model.transformer import DeepSeek`.
"""

__version__ = "0.1.0"
