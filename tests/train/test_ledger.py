"""The ledger of rows that are passed over: which row of the data the n-th row of a run is."""

from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.train.ledger import Ledger, Passing


def entry(rows, step=1, from_step=0):
    return {"step": step, "from_step": from_step, "rows": list(rows), "time": 0.0}


spans = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)).map(lambda s: (s[0], s[0] + s[1])), max_size=5)


@settings(deadline=None)
@given(spans)
def test_rows_that_are_left_keep_their_order(tmp_path_factory, spans):
    ledger = Ledger(tmp_path_factory.mktemp("run"))
    for span in spans:
        ledger.add(entry(span), write=False)
    gone = {row for start, stop in spans for row in range(start, stop)}
    left = [row for row in range(200) if row not in gone]
    assert [ledger.row(n) for n in range(len(left))] == left
    assert [Passing(range(200), ledger)[n] for n in range(50)] == left[:50]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 10)), max_size=5))
def test_a_rollback_leaves_the_rows_before_it_where_they_were(tmp_path_factory, rollbacks):
    """Entries made as a run makes them: from the rows that the run sees."""
    ledger = Ledger(tmp_path_factory.mktemp("run"))
    for first, n in rollbacks:
        before = [ledger.row(k) for k in range(first)]
        passed = [ledger.row(k) for k in range(first, first + n)]
        ledger.add(entry((passed[0], passed[-1] + 1)), write=False)
        assert [ledger.row(k) for k in range(first)] == before
        assert not set(passed) & {ledger.row(k) for k in range(100)}


def test_the_ledger_survives_the_process(tmp_path):
    first = Ledger(tmp_path)
    first.add(entry((3, 9), step=5, from_step=2), write=True)
    first.add(entry((20, 22), step=9, from_step=7), write=True)
    again = Ledger(tmp_path)
    assert again.entries == first.entries and len(again) == 2
    assert [again.stale_after(known) for known in (0, 1, 2)] == [2, 7, None]
