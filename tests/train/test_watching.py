"""The thread that watches a job's other processes, without a job: `tests/system/test_processes.py` has real ones."""

import threading

import pytest

from dsjax.train import processes


class Store:
    """JAX's key-value store, in which a process is told of a failure at its second look."""

    looks = 0

    def key_value_set(self, *_, **__):
        pass

    def key_value_dir_get(self, _):
        return []

    def key_value_try_get(self, _):
        self.looks += 1
        return "process 1: failed" if self.looks > 1 else None


def test_the_watching_thread_outlives_what_jax_forgets_at_its_end(monkeypatch):
    ended, clients = [], iter([Store()])

    class Ended(BaseException):
        pass

    def end(message):
        ended.append(message)
        raise Ended

    monkeypatch.setattr(processes, "_client", lambda: next(clients, None))  # there for the first who asks
    monkeypatch.setattr(processes, "_end", end)
    monkeypatch.setattr(processes, "GRACE_S", 0)
    monkeypatch.setattr(processes, "POLL_S", 0.01)
    with pytest.raises(Ended):
        processes._watch(threading.Event(), 30)
    assert ended == ["process 1: failed"]
