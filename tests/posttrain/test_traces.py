"""Answers worth learning from: which are kept, what `dsjax sft` makes of them, and a command that was killed."""

import json

import models
import numpy as np
import pytest

from dsjax.config import ConfigError, DataConfig
from dsjax.data.tokenizer import BOS, EOS, bytes_tokenizer
from dsjax.hub.chat import ChatTemplate
from dsjax.infer.engine import Engine
from dsjax.posttrain import traces
from dsjax.posttrain.chats import read_chats, render_record
from dsjax.posttrain.evaluate import Answer, Asked
from dsjax.posttrain.problem import Problem
from dsjax.posttrain.tasks import begun, encode
from dsjax.posttrain.traces import distinct, language_share, record, write_traces

CFG = models.v3(num_hidden_layers=2, max_position_embeddings=64, vocab_size=264)
BYTES = bytes_tokenizer()
# As DeepSeek-R1's: the prompt begins the reasoning, and what is past has none.
THINKS = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ 'U' + m.content }}{% else -%}
{{ 'A' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ 'A<think>\\n' }}{% endif %}"""

TURNS = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ 'U' + m.content }}{% else -%}
{{ 'A' + m.content + eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'A' }}{% endif %}"""


class Letters:
    """A task that random texts solve now and then: the first letter is of the lower half."""

    name, weights = "letters", {"accuracy": 1.0, "format": 0.5}

    def problem(self, index):
        return PROBLEMS[index % 3]

    def heldout(self):
        return []

    def judge(self, problems, texts):
        return [{"accuracy": float(text[:1] < "P"), "format": 1.0} for text in texts]


PROBLEMS = [Problem(f"{i}?") for i in range(3)]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A model of which every other token ends an answer."""
    folder = tmp_path_factory.mktemp("model")
    found = models.of_bytes(folder, CFG)
    found.tokenizer.eos_ids = (found.tokenizer.eos_id, *range(134, 264))
    return found


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def said(problem, sample, text, accuracy=1.0, form=1.0, reason="stop", n_tokens=5, before=""):
    answer = Answer(problem, sample, text, reason, n_tokens, -0.5)
    return Asked(answer, before + text, {"accuracy": accuracy, "format": form})


ALL = [
    said(0, 0, "one"),
    said(0, 1, "two", accuracy=0),
    said(0, 2, "one"),
    said(0, 3, "three", form=0),
    said(1, 0, "one", reason="length"),
    said(1, 1, " "),
    said(1, 2, "long", n_tokens=9),
    said(1, 3, "one eins 一 二"),
    said(2, 0, "first"),
    said(2, 1, "second"),
    said(2, 2, "third"),
]


def kept(monkeypatch, out, answers=ALL, **options):
    def ask(loaded, task, problems, asking, **options):
        options["out"].write_text("")
        return answers

    monkeypatch.setattr(traces, "ask", ask)
    counts = write_traces(None, Letters(), PROBLEMS, out, **options)
    return counts, lines(out)


def test_right_answers_are_kept_once_and_the_others_counted(monkeypatch, tmp_path):
    counts, rows = kept(monkeypatch, tmp_path / "out.jsonl", longest=8, language=0.9, most=2)
    assert [row["completion"] for row in rows] == ["one", "first", "second"]
    assert counts == {"problems": 3, "answers": 11, "solved": 2, "kept": 3, "cut_off": 1, "wrong": 2, "empty": 1,
                      "long": 1, "mixed": 1, "duplicate": 1, "over": 1}  # fmt: skip
    assert rows[0] == {"prompt": "0?", "completion": "one", "problem": 0, "sample": 0, "tokens": 5, "reward": 1.5,
                       "rewards": {"accuracy": 1.0, "format": 1.0}}  # fmt: skip


def test_what_is_kept_can_be_chosen_but_not_what_was_cut_off(monkeypatch, tmp_path):
    every = kept(monkeypatch, tmp_path / "all.jsonl", keep="all")[1]
    assert [row["completion"] for row in every] == [*("one", "two", "three"), "long", "one eins 一 二", *(
        "first", "second", "third")]  # fmt: skip
    wrong = kept(monkeypatch, tmp_path / "wrong.jsonl", keep=lambda parts: parts["accuracy"] < 1)[1]
    assert [row["completion"] for row in wrong] == ["two"]
    thoughts = [said(0, 0, "so it is", before="<think>"), said(0, 1, "so</think>it is", before="<think>")]
    counts, rows = kept(monkeypatch, tmp_path / "t.jsonl", thoughts, keep="all", style="chat")
    assert counts["cut_off"] == 1 and rows[0]["messages"][1]["content"] == "<think>so</think>it is"


def test_problems_that_come_round_again_are_one(monkeypatch, tmp_path):
    class Short(Letters):
        pass

    assert distinct(Short(), 8) == PROBLEMS
    twice = [said(0, 0, "one"), said(1, 0, "two"), said(1, 1, "three")]
    monkeypatch.setattr("test_traces.PROBLEMS", [PROBLEMS[0]] * 2)
    counts, rows = kept(monkeypatch, tmp_path / "out.jsonl", twice, most=2)
    assert [row["completion"] for row in rows] == ["one", "two"] and (counts["over"], counts["solved"]) == (1, 1)


def test_an_answer_with_any_line_break_of_unicode_is_one_record(monkeypatch, tmp_path):
    text = "one\u2028two\u2029three\x85four\nfive"
    _, rows = kept(monkeypatch, tmp_path / "out.jsonl", [said(0, 0, text)])
    assert [row["completion"] for row in rows] == [text]
    data = DataConfig(sources=(str(tmp_path / "out.jsonl"),))
    ((_, (read,), _),) = read_chats(data, 2048, None, BYTES, {})
    assert BYTES.decode(read.tokens[read.learned]) == text


def test_turns_that_were_given_are_not_learned():
    template = ChatTemplate(TURNS, "t.jinja", {"bos_token": BOS, "eos_token": EOS})
    given = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"})
    row = record(Problem(given), said(0, 0, "d"), {"accuracy": 1.0, "format": 1.0}, "chat")
    (chat,) = render_record(row, template, BYTES)
    assert BYTES.decode(chat.tokens[chat.learned], False) == f"d{EOS}"
    assert BYTES.decode(chat.tokens, False) == f"{BOS}UaAb{EOS}UcAd{EOS}"


def test_sft_learns_what_the_model_said_behind_its_prompt(tmp_path):
    template = ChatTemplate(THINKS, "t.jinja", {"bos_token": BOS, "eos_token": EOS})
    spoken = (Problem("1 + 1"), Problem(({"role": "user", "content": "1 + 1"},)))
    for problem, style, text in (
        (PROBLEMS[0], "plain", "<think>a</think>b"),
        (PROBLEMS[0], "r1_zero", " <think>a</think> <answer>b</answer>"),
        *((problem, "chat", "two\n</think>\n\n2") for problem in spoken),
    ):
        before = begun(problem, template, style)
        row = record(problem, said(0, 0, text, before=before), {"accuracy": 1.0, "format": 1.0}, style)
        (chat,) = render_record(row, template, BYTES)
        prompt = encode(problem, BYTES, template, style)
        assert chat.tokens.tolist() == [*prompt, *BYTES.encode_rendered(text), BYTES.eos_id]
        np.testing.assert_array_equal(chat.learned, np.arange(len(chat.tokens)) >= len(prompt))
        path = tmp_path / f"{style}.jsonl"
        path.write_text(json.dumps(row) + "\n")
        ((_, (read,), _),) = read_chats(DataConfig(sources=(str(path),)), 2048, template, BYTES, {})
        assert read.tokens.tolist() == chat.tokens.tolist()


def test_language_share():
    assert language_share(Problem("x", facts={"language": "zh"}), "好 good 的") == 2 / 3
    assert language_share(Problem("x"), "good 好 word") == 2 / 3 and language_share(Problem("x"), "1 + 1") == 1


def test_a_killed_command_goes_on_and_other_answers_can_be_kept_later(loaded, tmp_path, monkeypatch):
    options = {"samples": 4, "max_tokens": 6, "seed": 3, "max_rows": 4, "label": "m", "say": lambda text: None}
    whole, out = tmp_path / "whole.jsonl", tmp_path / "new" / "out.jsonl"
    counts = write_traces(loaded, Letters(), PROBLEMS, whole, **options)
    assert 0 < counts["kept"] < 12 and counts["answers"] == 12 and counts["cut_off"] < 6
    assert all(row["rewards"]["accuracy"] == 1 for row in lines(whole)) and len(lines(whole)) == counts["kept"]
    step, n = Engine.step, 0

    def killed(self):
        nonlocal n
        n += 1
        if n == 4:  # some are done by now
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Engine, "step", killed)
        write_traces(loaded, Letters(), PROBLEMS, out, **options)
    n_done = len(lines(traces.answers_of(out))) - 1
    assert 0 < n_done < 12 and not out.exists()
    assert write_traces(loaded, Letters(), PROBLEMS, out, **options) == counts
    assert lines(out) == lines(whole)
    monkeypatch.setattr(Engine, "step", None)  # nothing is left to ask
    assert write_traces(loaded, Letters(), PROBLEMS, out, keep="all", **options)["kept"] >= counts["kept"]
    with pytest.raises(ConfigError, match="its answers are of model=m, and now it is n; expected a new file"):
        write_traces(loaded, Letters(), PROBLEMS, out, **options | {"label": "n"})


def test_what_cannot_be_traced(loaded, tmp_path):
    unsure = [Problem("x", facts={"rewards": ["format"]})]
    (tmp_path / "mine.jsonl").write_text("{}\n")
    for problems, options, message in (
        (unsure, {}, "rewards=format: problem 0: expected one of accuracy, choice, code, gym among them"),
        ([], {}, "letters: no problems to ask"),
        (PROBLEMS, {"keep": "best"}, "keep=best: expected right or all"),
        (PROBLEMS, {"out": tmp_path / "mine.jsonl"}, "mine.jsonl: not one that this command wrote"),
    ):
        with pytest.raises(ConfigError, match=message):
            write_traces(loaded, Letters(), problems, **{"out": tmp_path / "out.jsonl"} | options)
