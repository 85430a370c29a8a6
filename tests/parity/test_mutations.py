"""Twelve known mistakes are each seen by the parity checks."""

import mutations
import pytest

from dsjax.model import mla


@pytest.mark.slow
def test_every_known_mistake_is_caught(capsys):
    assert len(mutations.MISTAKES) == 12
    assert mutations.run(mutations.MISTAKES) == []
    print(capsys.readouterr().out)


def test_what_changes_nothing_is_reported_as_not_caught():
    same = mutations.Mistake(mla, "softmax_scale", mla.softmax_scale)
    assert mutations.run({"nothing": same}) == ["nothing"]
