"""The claim of long context: what its text teaches, what holds, and one small run of all of it."""

import json
import random
import re

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsjax.claims import long_context as claim
from dsjax.config import replace
from dsjax.train import layout, loop

LINE = re.compile(rf"@([{claim.KEYS}])(\d\d);")
TEXT = "def f(x):\n    return x + 1\n" * 100


@given(st.integers(20, 2046), st.sampled_from([0.0, 0.3, 0.6, 0.9, 0.95]), st.integers(0, 10**6))
def test_a_document_has_its_size_and_every_key_one_value(n_bytes, fill, seed):
    text = claim.document(random.Random(seed), n_bytes, 4, fill, 0.5, [TEXT])
    assert len(text.encode()) == n_bytes or (fill == 0 and n_bytes - claim.LINE_BYTES < len(text) <= n_bytes)
    values = {}
    for key, value in LINE.findall(text):
        assert values.setdefault(key, value) == value
    assert values
    assert "@" not in LINE.sub("", text)


def test_half_of_the_documents_ask_at_the_end_for_what_came_before():
    texts = [claim.document(random.Random(seed), 1000, 8, 0.9, 0.5, [TEXT]) for seed in range(200)]
    asked = 0
    for text in texts:
        lines = LINE.findall(text)
        stated, end = lines[: len(lines) // 2], lines[len(lines) // 2 :]
        if len(set(stated)) == len(stated) == 8 and set(stated) == set(end):
            assert text.endswith("".join(f"@{key}{value};" for key, value in end))
            asked += 1
    assert 60 < asked < 140


def model(*shares):
    return {"lengths": [256, 2048], "share": [[1.0, share] for share in shares]}


@pytest.mark.parametrize(
    ("before", "yarn", "after", "holds"),
    [(0.2, 0.4, 0.95, True), (0.2, 0.4, 0.89, False), (0.92, 0.1, 0.95, False), (0.1, 0.92, 0.95, True)],
)
def test_it_holds_where_needles_are_found_after_and_not_before(before, yarn, after, holds):
    found = {"before": model(before, before), "before, with YaRN": model(yarn, yarn), "after": model(after, after)}
    result = claim.compare(found)
    assert result["holds"] is holds
    assert result["found_at_longest"]["after"] == pytest.approx(after)
    assert result["learned"] is True
    found["before"]["share"] = [[0.5, before]]
    assert claim.compare(found)["holds"] is claim.compare(found)["learned"] is False
    found["before"]["share"] = [[1.0, before]]
    head, rows = claim.table(result)
    assert head == ["model", "256", "2,048"] and rows[0] == ("before", "100%", f"{100 * before:.0f}%")


@pytest.mark.slow
def test_the_whole_claim_runs_and_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "devices", lambda: jax.devices()[:1])
    monkeypatch.setattr(loop.Run, "_evaluate", lambda *_: None)
    monkeypatch.setattr(claim, "SHORT", 300)
    monkeypatch.setattr(claim, "LONG", 30)
    config = replace(claim.small_model(), steps=3, batch_size=2, seq_len=64)
    result = claim.test(config, 2, 2, tmp_path, print)
    assert json.loads((tmp_path / "claim.json").read_text()) == result
    assert result["holds"] is False  # nothing is learned in three steps
    assert [model["lengths"] for model in result["models"].values()] == [[64, 128, 256, 512]] * 3
    assert (tmp_path / "claim.png").stat().st_size > 10_000
    again = claim.test(config, 2, 2, tmp_path, print)
    assert again["models"] == result["models"]
