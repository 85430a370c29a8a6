"""Problems by what a user types, split, shuffled, put into prompts, and judged."""

import json
import re
import shutil

import pytest

from dsjax.config import ConfigError
from dsjax.data.tokenizer import bytes_tokenizer
from dsjax.hub.chat import ChatTemplate
from dsjax.posttrain.judging import Judging, read_weights
from dsjax.posttrain.parity import is_heldout, parity_chain, parity_short
from dsjax.posttrain.problem import Problem
from dsjax.posttrain.rewards import REWARDS
from dsjax.posttrain.tasks import STYLES, Task, begun, encode, open_task, render, total

BOX = r"<think>so</think><answer>\boxed{%s}</answer>"


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    records = [{"prompt": f"{i} + {i} =", "answer": str(2 * i), "language": "en"} for i in range(300)]
    return write(tmp_path_factory.mktemp("tasks") / "sums.jsonl", records)


def asked(task, indices):
    return [task.problem(i).prompt for i in indices]


def test_a_file_is_asked_once_an_epoch_in_an_order_of_its_own(sums):
    with open_task(sums, weights="format,language:0.1", seed=3) as task:
        assert isinstance(task, Task) and task.name == "sums" and task.weights == {"format": 1, "language": 0.1}
        held = [p.prompt for p in task.heldout()]
        n = 300 - len(held)
        first, second = asked(task, range(n)), asked(task, range(n, 2 * n))
        assert 0 < len(held) < 30 and not set(first) & set(held)
        assert sorted(first) == sorted(second) and len(set(first)) == n and first != second
        assert asked(task, reversed(range(n))) == first[::-1]
        assert task.problem(0).facts == {"language": "en"} and int(task.problem(0).answer) % 2 == 0
    with open_task(sums, weights="format", seed=3) as again, open_task(sums, weights="format", seed=4) as other:
        assert asked(again, range(n)) == first != asked(other, range(n))
        assert [p.prompt for p in other.heldout()] == held


def test_a_file_of_its_own_is_held_out(sums, tmp_path):
    held = write(tmp_path / "held.jsonl", [{"prompt": "7 + 7 ="}, {"prompt": "new"}])
    with open_task(sums, weights="format", heldout=held) as task:
        assert [p.prompt for p in task.heldout()] == ["7 + 7 =", "new"]
        assert "7 + 7 =" not in asked(task, range(299)) and len(set(asked(task, range(299)))) == 299
    with open_task(sums, weights="format", heldout=sums) as task:
        assert len(task.heldout()) == 300
        with pytest.raises(ConfigError, match="sums: no problem to learn from"):
            task.problem(0)


def test_rewards_of_a_file(tmp_path):
    pytest.importorskip("math_verify", reason="needs the posttrain extra")
    records = [
        {"prompt": "2 + 2 =", "answer": 4, "rewards": ["accuracy", "format"]},
        {"messages": [{"role": "user", "content": "A or B?"}], "answer": "B", "rewards": ["choice"]},
    ]
    path = write(tmp_path / "mixed.jsonl", records)
    with open_task(path, heldout=path) as task:
        assert task.weights == {"accuracy": 1, "format": 1, "choice": 1}
        sum_, choice = task.heldout()
        got = task.judge([sum_, choice, sum_], [BOX % "4.0", BOX % "b", "4"])
        assert got == [{"accuracy": 1, "format": 1}, {"choice": 1}, {"accuracy": 0, "format": 0}]
        assert [total(parts, task.weights) for parts in got] == [2, 1, 0]
        assert total({"accuracy": 1.0, "format": 1.0}, {"accuracy": 1.0, "format": 0.5}) == 1.5
        assert task.answer(sum_, r"\boxed{1} \boxed{2}") == "2" and task.answer(choice, "The answer is B") == "B"
        assert task.answer(choice, r"\boxed{(B)}") == task.answer(choice, r"\boxed{b}") == "B"
        assert task.answer(sum_, "The answer is B") is task.answer(choice, "none") is None


def test_a_program_is_judged_in_the_sandbox_or_not_at_all(tmp_path, monkeypatch):
    path = write(tmp_path / "code.jsonl", [{"prompt": "Add.", "tests": [["1 2", "3"]], "rewards": ["code"]}])
    if shutil.which("bwrap") is not None:
        with open_task(path, heldout=path) as task:
            program = "```python\nprint(sum(map(int, input().split())))\n```"
            assert task.judge(task.heldout() * 2, [program, "3"]) == [{"code": 1}, {"code": 0}]
            assert task.answer(task.heldout()[0], r"\boxed{3}") is None  # nothing to vote on
    from dsjax.posttrain.rewards import sandbox

    def none():
        raise sandbox.SandboxError("no sandbox")

    monkeypatch.setattr(sandbox, "check", none)
    with pytest.raises(ConfigError, match="no sandbox"):
        open_task(path)


GOOD = {"prompt": "1 + 1 =", "answer": "2"}


@pytest.mark.parametrize(
    "record, weights, message",
    [
        ({"answer": "2"}, None, ".*expected an object with prompt or with messages"),
        ({**GOOD, "messages": []}, None, ".*expected an object with prompt or with messages"),
        ({"messages": ["x"]}, None, 'messages=.*expected a list of {"role"'),
        ({"prompt": 3}, None, "prompt=3: expected a text"),
        ({**GOOD, "answer": [1]}, None, r"answer=1: expected a text or a number"),
        ({"prompt": "x"}, "accuracy", "answer: expected a text, for the reward accuracy"),
        (GOOD, "choice", "answer=2: expected a letter, for the reward choice"),
        (GOOD, "format,language", "language: expected one of ar, bg,"),
        ({**GOOD, "language": "klingon"}, "language", "language=klingon: expected one of"),
        ({**GOOD, "tests": [["1"]]}, "code", "tests: expected pairs of input and output, for the reward code"),
        (GOOD, "gym", "entry: expected a problem of gym:NAME, for the reward gym"),
        ({**GOOD, "entry": {}}, "gym", "gym: expected a problem of gym:NAME, for the reward gym"),
        ({**GOOD, "rewards": ["format"]}, "think", "rewards=format: expected names of the task's rewards, think"),
        ({**GOOD, "rewards": 3}, "think", "rewards=3: expected a list of names"),
    ],
)
def test_a_line_that_cannot_be_judged_is_named_at_once(tmp_path, record, weights, message):
    path = write(tmp_path / "bad.jsonl", [GOOD | {"language": "en", "rewards": []}, record])
    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))}: line 2: {message}"):
        open_task(path, weights=weights)


def test_rewards_of_one_line_are_not_those_of_the_others(tmp_path):
    lines = [{"prompt": "1", "answer": "B"}, {"prompt": "2", "answer": "B", "rewards": ["choice"]}]
    path = write(tmp_path / "some.jsonl", lines)
    message = f"{path}: line 1: rewards: expected, for {path}: line 2 names its own; or weights for all"
    with pytest.raises(ConfigError, match=re.escape(message)):
        open_task(path)
    other = write(tmp_path / "other.jsonl", lines[1:])
    with pytest.raises(ConfigError, match=r"held.jsonl: line 1: rewards: expected"):
        open_task(other, heldout=write(tmp_path / "held.jsonl", lines[:1]))
    with open_task(path, weights="choice,format", heldout=path) as task:
        assert task.judge(task.heldout(), ["B", "B"]) == [{"choice": 1, "format": 0}, {"choice": 1}]


def test_what_is_no_task(tmp_path):
    (tmp_path / "not.jsonl").write_text("{\n")
    with pytest.raises(ConfigError, match=r"not.jsonl: line 1: not JSON"):
        open_task(tmp_path / "not.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match=r"empty.jsonl: expected a problem a line, and it has none"):
        open_task(tmp_path / "empty.jsonl")
    for spec, message in (
        ("gyn:chain_sum", "task=gyn:chain_sum: expected a .jsonl file, gym:NAME, or parity:BITS; the nearest is gym:"),
        ("nowhere.jsonl", "task=nowhere.jsonl: expected a .jsonl file"),
        ("x" * 5000, "expected a .jsonl file, gym:NAME, or parity:BITS"),
        ("parity:24," + "x" * 5000 + ".jsonl", "expected a .jsonl file, gym:NAME, or parity:BITS"),
        ("parity:x", "parity:x: expected a number of bits"),
        ("parity:4", "parity:4: expected 8 to 4096 bits"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            open_task(spec)
    with pytest.raises(ConfigError, match="heldout=x: expected with a file"):
        open_task("parity:24", heldout="x")
    for weights in ("format", "accuracy:2", "accuracy,format"):
        with pytest.raises(ConfigError, match="expected accuracy alone, for parity"):
            open_task("parity:24", weights=weights)
    for weights in ("accuracy", "accuracy:1.0", " accuracy:1", {"accuracy": 1.0}):
        assert open_task("parity:24", weights=weights).weights == {"accuracy": 1}


def test_weights_as_they_are_typed():
    assert read_weights("accuracy:1,format:0.5, language") == {"accuracy": 1, "format": 0.5, "language": 1}
    assert read_weights({"format": -1.0}) == {"format": -1}
    for given, message in (
        ("acuracy:1", "rewards: acuracy: no such reward; the nearest is accuracy of accuracy, format"),
        ("format:x", "rewards: format:x: expected a number, as in format:0.5"),
        ("format:inf", "rewards: format:inf: expected a number"),
        ("format,format", "rewards: format: given twice"),
        ({}, "rewards: expected at least one of accuracy"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_weights(given)


def test_what_judges_is_closed_also_when_another_part_cannot_be_had(monkeypatch):
    pytest.importorskip("math_verify", reason="needs the posttrain extra")
    from dsjax.posttrain.rewards import accuracy, sandbox

    made = []
    monkeypatch.setattr(accuracy, "Judges", lambda: made.append(_Counted()) or made[-1])

    def none():
        raise sandbox.SandboxError("no sandbox")

    monkeypatch.setattr(sandbox, "check", none)
    with pytest.raises(ConfigError, match="no sandbox"):
        Judging(["accuracy", "code"])
    judging = Judging(["accuracy"])
    assert [one.open for one in made] == [False, True]
    judging.close()
    assert [one.open for one in made] == [False, False]


class _Counted:
    open = False

    def __enter__(self):
        self.open = True
        return self

    def __exit__(self, *_):
        self.open = False


def test_every_reward_says_what_it_lacks():
    bare = Problem("x")
    assert {name for name, reward in REWARDS.items() if reward.lacks(bare) is None} == {"format", "think"}
    whole = Problem("x", "B", {"language": "en", "tests": [("", "")], "entry": {}, "gym": ("x", {})})
    assert all(reward.lacks(whole) is None for reward in REWARDS.values())


def test_parity():
    with open_task("parity:24", seed=1) as task, open_task("parity:24", seed=2) as other:
        problems, held = [task.problem(i) for i in range(400)], task.heldout()
        assert problems[7] == open_task("parity:24", seed=1).problem(7) != other.problem(7)
        assert len({p.prompt for p in held}) == 256 and all(is_heldout(p.prompt[:-1]) for p in held)
        assert other.heldout() == held and not any(is_heldout(p.prompt[:-1]) for p in problems)
        for problem in (*problems, *held):
            bits = problem.prompt.removesuffix("=")
            assert len(bits) == 24 and problem.answer == "eo"[bits.count("1") % 2]
            chain, short = parity_chain(bits), parity_short(bits)
            assert "".join("10"[letter in "ab"] for letter in chain[:24]) == bits
            assert [letter in "bB" for letter in chain[:24]] == [bits[: i + 1].count("1") % 2 == 1 for i in range(24)]
            assert chain[24:] == short == problem.answer
        assert parity_chain("0110") == "aBAae"
        right, wrong = problem.answer, "eo".replace(problem.answer, "")
        texts = [right, f"abB{right}", wrong, f"{wrong}{right}", f"{right}{right}", f"{right}\n", "a", ""]
        judged = task.judge([problem] * len(texts), texts)
        assert [total(parts, task.weights) for parts in judged] == [1, 1, 0, 0, 0, 0, 0, 0]
    short = open_task("parity:8")
    held = {p.prompt for p in short.heldout()}
    assert held and not held & set(asked(short, range(2000)))


def test_prompts_in_every_style():
    tokenizer = bytes_tokenizer()
    template = ChatTemplate("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}<｜Assistant｜><think>\n")
    problem, talk = Problem("1+1={x}?"), Problem(({"role": "user", "content": "Hi"},))
    decode = lambda ids: tokenizer.decode(ids)  # noqa: E731
    plain, zero, chat = (encode(problem, tokenizer, template, style) for style in STYLES)
    assert plain[0] == zero[0] == tokenizer.bos_id and decode(plain) == "1+1={x}?"
    assert decode(zero).endswith("\nUser: 1+1={x}?\nAssistant:") and decode(zero).count("<answer>") == 2
    assert decode(chat) == render(problem, template, "chat") == "[user]1+1={x}?<｜Assistant｜><think>"
    assert decode(encode(talk, tokenizer, template, "chat")).startswith("[user]Hi")
    assert [begun(problem, template, style) for style in STYLES] == ["", "", "<think>"]
    for args, message in (
        ((talk, template, "plain"), "style=plain: expected a prompt that is a text"),
        ((problem, None, "chat"), "style=chat: the model has no chat template"),
        ((problem, None, "r1zero"), "style=r1zero: expected plain, r1_zero, chat; the nearest is r1_zero"),
    ):
        with pytest.raises(ConfigError, match=message):
            render(*args)
