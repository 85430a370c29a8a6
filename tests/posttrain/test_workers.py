"""Processes that answer within a time, and those that cannot begin."""

import functools
import subprocess
import sys
import time

import pytest

from dsjax.config import ConfigError
from dsjax.posttrain.rewards.workers import Workers

UNGUARDED = """
from dsjax.posttrain.rewards.accuracy import Judges
with Judges(2) as judges:
    print(judges.same("x+1", "1+x"))
"""


def broken(pipe):
    raise SystemExit(3)


def begins_once(flag, pipe):
    if flag.exists():
        raise SystemExit(4)
    flag.touch()
    pipe.send_bytes(b"ready")
    pipe.recv_bytes()
    time.sleep(1000)


def test_a_worker_that_cannot_begin_is_an_error():
    workers = Workers(broken, 2, 1.0)
    with pytest.raises(ConfigError, match="could not begin: exit code 3"), workers:
        pass
    assert not any(worker._process.is_alive() for worker in workers._all)


def test_a_worker_that_cannot_begin_again_is_an_error(tmp_path):
    with Workers(functools.partial(begins_once, tmp_path / "flag"), 1, 0.2) as workers:
        assert workers.ask(b"?") is None and workers.killed == 1
        for _ in range(2):
            with pytest.raises(ConfigError, match="could not begin: exit code 4"):
                workers.ask(b"?")


def test_a_script_without_a_main_guard_is_told_so(tmp_path):
    pytest.importorskip("math_verify", reason="needs the posttrain extra")
    (tmp_path / "script.py").write_text(UNGUARDED)
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "False" not in done.stdout
    assert done.stderr.strip().splitlines()[-1].endswith('`if __name__ == "__main__":`')
