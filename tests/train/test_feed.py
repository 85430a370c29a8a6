"""Batches for the loop: in order, errors and all; a wait is told of, and ends."""

import threading
import time

import pytest

from dsjax.config import ConfigError, FaultsConfig
from dsjax.train.feed import Feed, Stalled


def feed(batches, warn=30.0, stop=60.0, **options):
    told = []
    faults = FaultsConfig(stall_warn_s=warn, stall_stop_s=stop)
    return Feed(iter(batches), faults, told.append, lambda: "shard 7", **options), told


def test_batches_come_in_order_and_end():
    source, told = feed([(step, {}) for step in range(5)])
    assert [next(source)[0] for _ in range(5)] == list(range(5))
    with pytest.raises(StopIteration):
        next(source)
    assert told == []


def test_what_reading_raises_reaches_the_loop():
    def read():
        yield 0, {}
        raise ConfigError("shard 3: damaged")

    source, _ = feed(read())
    assert next(source) == (0, {})
    with pytest.raises(ConfigError, match="shard 3: damaged"):
        next(source)


def test_a_wait_is_told_of_and_so_is_its_end():
    def read():
        time.sleep(0.7)
        yield 0, {}

    source, told = feed(read(), warn=0.3)
    assert next(source) == (0, {})
    assert len(told) == 2 and told[0].endswith("waiting for shard 7") and told[1].startswith("the data goes on")


def test_a_source_that_does_not_answer_is_given_up_by_name():
    over = threading.Event()

    def read():
        yield 0, {}
        over.wait()

    source, told = feed(read(), warn=0.2, stop=0.5)
    next(source)
    with pytest.raises(Stalled, match=r"no batch for \d+ s .*shard 7 does not answer"):
        next(source)
    assert len(told) == 1
    over.set()


def test_a_signal_ends_a_wait():
    over = threading.Event()
    source, _ = feed(iter(over.wait, True), interrupted=lambda: True)
    assert next(source) is None
    over.set()


def test_a_closed_feed_reads_no_further():
    read = []

    def rows():
        for n in range(1000):
            read.append(n)
            yield n, {}

    source, _ = feed(rows())
    next(source)
    source.close()
    time.sleep(0.5)
    assert len(read) <= 5
