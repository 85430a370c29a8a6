"""Several processes of one job: they start together, wait for the first one, stop at one step, and end together.

A job of one process passes through here unchanged. What the processes tell each other goes through the key-value store
of JAX's own coordination service, in process 0. A process that is killed is missed there after
distributed.heartbeat_timeout_s; where process 0 is killed itself, JAX ends the others.
"""

import contextlib
import functools
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax import P
from jax._src import clusters, distributed  # neither what JAX finds nor its key-value store has a public name

from dsjax.config import ConfigError, DistributedConfig
from sharding.mesh import AXES

T = TypeVar("T")
GRACE_S = 3  # from an error in one process to the end of all, whatever they wait for
POLL_S = 0.5
_JAX_LATER_S = 15  # what JAX's own waits are longer than ours, as they end in a stack trace
_FAILED, _ALIVE = "dsjax/failed", "dsjax/alive"
# Of errors that only tell of another process's end.
_LOST = ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "coordination service", "Connection reset", "NCCL")
_AGAIN = "start the job again, with any number of processes"
_turns = itertools.count()
_watched, _ended = threading.Event(), threading.Event()


def start(config: DistributedConfig) -> None:
    """Makes fake devices if asked to, and joins the processes of the job; to be called before anything uses devices.

    Without an address the job is a cluster's that JAX finds, or one process. Raises ConfigError if it cannot be.
    """
    if config.devices is not None:
        try:
            jax.config.update("jax_num_cpu_devices", config.devices)
        except RuntimeError:
            if jax.local_device_count() != config.devices:
                raise ConfigError(
                    f"--devices={config.devices}: JAX has already started here, with {jax.local_device_count()} "
                    "devices; expected a new process"
                ) from None
    if _client() is None:
        _join(config)
    if config.devices is not None and jax.default_backend() != "cpu":
        raise ConfigError(
            f"--devices={config.devices}: fake devices are for the CPU, and this machine computes on "
            f"{jax.default_backend()}; JAX_PLATFORMS=cpu before the command changes that"
        )


def _join(config: DistributedConfig) -> None:
    given = {name: getattr(config, name) for name in ("coordinator_address", "num_processes", "process_id")}
    missing = [name for name, value in given.items() if value is None]
    cluster = _cluster() if config.auto and missing else None
    if cluster is None and len(missing) == len(given):
        return
    if cluster is None and missing:
        raise ConfigError(
            f"distributed.{missing[0]}: missing; expected {', '.join(given)} together, where no cluster is found"
        )
    n = config.num_processes or cluster.get_process_count()
    if n == 1:
        return
    where = config.coordinator_address or f"the coordinator of {cluster.name}"
    late = f"distributed: not all of {n} processes came to {where} within {config.start_timeout_s} s"
    timer = threading.Timer(config.start_timeout_s, _end, [late])
    timer.daemon = True
    timer.start()
    _keep_standard_output()
    print(f"dsjax: waiting for {n} processes at {where}", file=sys.stderr, flush=True)
    try:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from us
        jax.distributed.initialize(
            **given,
            cluster_detection_method=None if cluster else "deactivate",
            initialization_timeout=config.start_timeout_s + _JAX_LATER_S,
            heartbeat_timeout_seconds=config.heartbeat_timeout_s + _JAX_LATER_S,
            shutdown_timeout_seconds=config.heartbeat_timeout_s + _JAX_LATER_S,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigError(f"distributed: {_first_line(error)}") from error
    finally:
        timer.cancel()


def check_joined() -> None:
    """Raises ConfigError if the devices belong to several processes that have not joined."""
    if _client() is None and jax.process_count() > 1:
        raise ConfigError(
            f"distributed: the devices belong to {jax.process_count()} processes, which must join; expected "
            "distributed.auto=true or distributed.coordinator_address=HOST:PORT"
        )


def first_alone(work: Callable[[bool], T]) -> T:
    """`work(True)` on process 0, and then `work(False)` on all others, which find what it left; all end together."""
    client = _client()
    if client is None:
        return work(True)
    turn, me = f"dsjax/turn/{next(_turns)}", distributed.global_state.process_id
    if me == 0:
        result = work(True)
        client.key_value_set(turn, "done")
    else:
        _wait_for(turn)
        result = work(False)
    client.key_value_set(f"{turn}/{me}", "done")
    for other in range(distributed.global_state.num_processes):
        _wait_for(f"{turn}/{other}")
    return result


def from_first(make: Callable[[], str]) -> str:
    """A text that process 0 makes, on all processes."""
    client, turn = _client(), f"dsjax/turn/{next(_turns)}"
    if client is None:
        return make()
    if distributed.global_state.process_id > 0:
        return _wait_for(turn)
    client.key_value_set(turn, text := make())
    return text


def first_problem(problem: str | None) -> str | None:
    """What went wrong on any process, None if nothing did; the same answer on all."""
    client, turn = _client(), f"dsjax/turn/{next(_turns)}"
    if client is None:
        return problem
    client.key_value_set(f"{turn}/{distributed.global_state.process_id}", problem or "none")
    said = [_wait_for(f"{turn}/{other}") for other in range(distributed.global_state.num_processes)]
    return next((text for text in said if text != "none"), None)


class Agreement:
    """What one process has heard, told to all at the same step: the name of a signal, one step after it was given.

    The names travel as numbers in a small program of their own beside the step, which nobody waits for.
    """

    def __init__(self, mesh, names: tuple[str, ...]):
        self.names, self.alone = names, _client() is None
        self.sharding = jax.NamedSharding(mesh, P(AXES))
        self.shape = (mesh.size,)
        self.largest = jax.jit(jax.numpy.max)
        self.asked: jax.Array | None = None

    def __call__(self, name: str | None) -> str | None:
        if self.alone:
            return name
        code = 0 if name is None else 1 + self.names.index(name)
        mine = functools.partial(np.full, dtype=np.int32, fill_value=code)
        votes = jax.make_array_from_callback(self.shape, self.sharding, lambda index: mine(_length(index, self.shape)))
        asked, self.asked = self.asked, self.largest(votes)
        heard = 0 if asked is None else int(asked)
        return self.names[heard - 1] if heard else None


@contextlib.contextmanager
def together(heartbeat_timeout_s: int = 30):
    """All processes end when one of them fails inside, each with its message. May stand inside another.

    A process that waits for a lost one, and so cannot be told, is ended after GRACE_S.
    """
    if _client() is None or _watched.is_set():
        with _telling():
            yield
        return
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=[over, heartbeat_timeout_s], daemon=True)
    _watched.set()
    watcher.start()
    try:
        with _telling():
            yield
        over.set()
        watcher.join()
    except BaseException:
        _ended.set()  # what has to be said is on its way up
        raise
    finally:
        _watched.clear()


def _keep_standard_output() -> None:
    """Sends to standard error what is not Python's: gloo tells of its connections where results belong."""
    try:
        if sys.stdout.fileno() != 1:
            return
    except (OSError, AttributeError):  # a notebook's, or none
        return
    sys.stdout.flush()
    ours = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(ours, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)


class _OtherFailed(ConfigError):
    """The failure of another process."""


def _client():
    return distributed.global_state.client


def _cluster():
    """The cluster that JAX would join by itself, or None."""
    kinds = clusters.ClusterEnv._cluster_types
    return next((kind for kind in kinds if not kind.opt_in_only_method and kind.is_env_present()), None)


def _wait_for(key: str) -> str:
    """The value of a key as soon as it is there. Raises ConfigError if a process fails meanwhile."""
    while True:
        try:
            return _client().blocking_key_value_get(key, int(POLL_S * 1000))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        if failure := _failure():
            raise _OtherFailed(failure)


def _failure(client=None) -> str | None:
    """What the first process to fail has said."""
    try:
        return (client or _client()).key_value_try_get(_FAILED)
    except jax.errors.JaxRuntimeError:
        return None


@contextlib.contextmanager
def _telling():
    """Tells the other processes of an error. One that only tells of another process's end becomes a ConfigError."""
    try:
        yield
    except _OtherFailed:
        raise
    except BaseException as error:
        if _client() is None:
            raise
        lost = isinstance(error, jax.errors.JaxRuntimeError) and any(mark in str(error) for mark in _LOST)
        if lost and (failure := _wait_for_failure()):
            raise _OtherFailed(failure) from error
        said = f"another process was killed or lost ({_first_line(error)}); {_AGAIN}" if lost else _first_line(error)
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # told already, or process 0 is gone
            _client().key_value_set(_FAILED, f"process {distributed.global_state.process_id}: {said}")
        if lost:
            raise ConfigError(said) from error
        raise


def _wait_for_failure() -> str | None:
    """What another process said of its end, if it had time to say it."""
    deadline = time.monotonic() + GRACE_S / 2
    while (failure := _failure()) is None and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return failure


def _watch(over: threading.Event, heartbeat_timeout_s: int) -> None:
    """Says that this process lives, and ends it when one has failed and the main thread has not ended in time.

    On process 0 it also finds out who has stopped saying so.
    """
    me, heard = distributed.global_state.process_id, {}
    client = _client()  # JAX forgets it when the interpreter ends, which this thread may see
    for beat in itertools.count():
        if over.wait(POLL_S):
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                _say_alive(client, me, "gone")
            return
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _say_alive(client, me, str(beat))
            if me == 0 and (silent := _silent(client, heard, heartbeat_timeout_s)):
                client.key_value_set(_FAILED, f"{silent} was killed or lost; {_AGAIN}")
        if failure := _failure(client):
            time.sleep(GRACE_S + 2 * POLL_S * (me == 0))  # with process 0 ends what the others ask
            _end(None if _ended.is_set() else failure)


def _say_alive(client, me: int, value: str) -> None:
    client.key_value_set(f"{_ALIVE}/{me}", value, allow_overwrite=True)


def _silent(client, heard: dict[str, tuple[str, float]], timeout_s: int) -> str | None:
    """A process whose last word is older than timeout_s. `heard` is kept between calls: last words and their times."""
    now = time.monotonic()
    for key, word in client.key_value_dir_get(_ALIVE):
        if heard.get(key, ("", now))[0] != word:
            heard[key] = word, now
        elif word != "gone" and now - heard[key][1] > timeout_s:
            return f"process {key.rpartition('/')[2]}"
    return None


def _end(message: str | None) -> None:
    if message is not None:
        print("dsjax: " + message, file=sys.stderr, flush=True)
    os._exit(2)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0][:300]
    if isinstance(error, KeyboardInterrupt):
        return f"ended by {text or 'Ctrl-C'}"
    return text if isinstance(error, ConfigError) else f"{type(error).__name__}: {text}".rstrip(": ")


def _length(index: tuple[slice, ...], shape: tuple[int, ...]) -> int:
    return len(range(*index[0].indices(shape[0])))
