"""Which implementation a name stands for, and what is said where another one has to do."""

import functools
import logging
from collections.abc import Iterable, Mapping

import jax

_log = logging.getLogger(__name__)


def choose(implementation: str, by_platform: Mapping[str, str], known: Iterable[str]) -> str:
    """The implementation that a name stands for: "auto" goes by platform, one that is not known raises ValueError."""
    if implementation == "auto":
        return by_platform[jax.default_backend()]
    if implementation not in known:
        raise ValueError(f"implementation={implementation!r}: choose one of {['auto', *known]}")
    return implementation


@functools.cache
def warn_once(message: str) -> None:
    """One line in the log, however often it is asked for."""
    _log.warning(message)
