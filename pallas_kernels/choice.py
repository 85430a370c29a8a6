"""Which implementation a name stands for."""

from collections.abc import Iterable, Mapping

import jax


def choose(implementation: str, by_platform: Mapping[str, str], known: Iterable[str]) -> str:
    """The implementation that a name stands for: "auto" goes by platform, one that is not known raises ValueError."""
    if implementation == "auto":
        return by_platform[jax.default_backend()]
    if implementation not in known:
        raise ValueError(f"implementation={implementation!r}: choose one of {['auto', *known]}")
    return implementation
