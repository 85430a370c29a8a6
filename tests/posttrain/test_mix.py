"""Tasks by weight: whose turn it is, what each is judged by, and what is refused."""

import json

import pytest

from dsjax.config import ConfigError
from dsjax.posttrain.mix import FACT, TaskMix, parts
from dsjax.posttrain.tasks import Task, open_task, total


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def files(tmp_path):
    letters = [
        {"prompt": f"l{i}", "answer": "B", "language": "en", "rewards": ["choice", "language"]} for i in range(90)
    ]
    forms = [{"prompt": f"f{i}", "rewards": ["think"]} for i in range(90)]
    return write(tmp_path / "letters.jsonl", letters), write(tmp_path / "forms.jsonl", forms)


@pytest.mark.parametrize(
    "spec, found",
    [
        ("a.jsonl", [("a.jsonl", 1)]),
        ("parity:24", [("parity:24", 1)]),
        ("a.jsonl:0.7,parity:24:0.3", [("a.jsonl", 0.7), ("parity:24", 0.3)]),
        ("parity:24,parity:16", [("parity:24", 1), ("parity:16", 1)]),
        ("gym:x?a=1,2:2,dir/b.jsonl", [("gym:x?a=1,2", 2), ("dir/b.jsonl", 1)]),
        ("C:/a.jsonl,b.jsonl:2", [("C:/a.jsonl", 1), ("b.jsonl", 2)]),
        ("gym:x?a=1,2", [("gym:x?a=1,2", 1)]),
    ],
)
def test_a_mix_is_named_by_its_tasks(spec, found):
    assert parts(spec) == found


def test_every_few_problems_have_the_shares_and_each_task_goes_its_own_way(files):
    one, other = files
    with open_task(f"{one}:3,{other}:1", seed=5) as mix, open_task(one, seed=5) as alone:
        assert isinstance(mix, Task) and mix.weights == {"choice": 1, "language": 1, "think": 1}
        asked = [mix.problem(i) for i in range(400)]
        for i in range(0, 400, 4):
            assert [p.prompt[0] for p in asked[i : i + 4]].count("l") == 3
        mine = [p for p in asked if p.prompt[0] == "l"]
        assert [p.prompt for p in mine] == [alone.problem(i).prompt for i in range(300)]
        assert mine[0].facts == {**alone.problem(0).facts, FACT: 0}
    with open_task(f"{one}:3,{other}:1", seed=5) as again:
        assert [again.problem(i) for i in (399, 7, 0)] == [asked[i] for i in (399, 7, 0)]


def test_held_out_ones_begin_with_the_shares_too(files):
    one, other = files
    with open_task(f"{one}:1,{other}:1") as mix, open_task(one) as a, open_task(other) as b:
        n = min(len(a.heldout()), len(b.heldout()))
        held = mix.heldout()
        assert n > 0 and len(held) == len(a.heldout()) + len(b.heldout())
        assert [p.facts[FACT] for p in held[: 2 * n]].count(0) == n


def test_each_text_is_judged_by_its_task(files):
    one, other = files
    with open_task(f"{one},{other}", weights="choice:1,think:0.5,language:2") as mix:
        first = next(p for p in map(mix.problem, range(9)) if p.prompt[0] == "l")
        second = next(p for p in map(mix.problem, range(9)) if p.prompt[0] == "f")
        texts = ["<think>x</think>B", "<think>x</think>B", "A"]
        judged = mix.judge([second, first, second], texts)
        assert judged == [{"think": 1}, {"choice": 1, "language": 1}, {"think": 0}]
        assert [total(of, mix.weights) for of in judged] == [0.5, 3, 0]
        assert mix.answer(first, "<answer>b</answer>") == "B" and mix.answer(second, "<answer>b</answer>") is None
    with open_task(f"{one},parity:24", weights="choice:1,language:1,accuracy:0.5") as mix:
        assert mix.weights == {"choice": 1, "language": 1, "accuracy": 0.5}


def test_each_task_of_a_mix_takes_the_weights_that_it_knows(tmp_path):
    pytest.importorskip("reasoning_gym", reason="needs the gym extra")
    letters = write(tmp_path / "l.jsonl", [{"prompt": f"l{i}", "answer": "B"} for i in range(90)])
    with open_task(f"{letters},gym:chain_sum", weights="choice:1,gym:2,format:0.5") as mix:
        first, second = mix.problem(0), mix.problem(1)
        judged = mix.judge([first, second], ["B", f"<answer>{second.answer}</answer>"])
        assert judged == [{"choice": 1, "format": 0}, {"gym": 1, "format": 0}]
    with pytest.raises(ConfigError, match=r"^rewards=gym: expected one that .*l.jsonl can be judged by as well"):
        open_task(f"{letters},gym:chain_sum", weights="gym")
    with pytest.raises(ConfigError, match=r"^rewards=choice: expected one that gym:chain_sum can be judged by as well"):
        open_task(f"{letters},gym:chain_sum", weights="choice")


class Weighed:
    name = "weighed"

    def __init__(self, weight):
        self.weights = {"accuracy": weight}


def test_what_is_no_mix_is_said(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # messages cut long paths short
    one, other = (str(file.relative_to(tmp_path)) for file in files)
    for spec, options, message in (
        (f"{one}:0,{other}", {}, rf"^task={one}:0: expected a weight greater than 0 behind the last colon, as in :0.5"),
        (f"{one}:x,{other}", {}, rf"^task={one}:x: expected a weight"),
        (f"{one},{other}", {"heldout": one}, "^heldout=.*: expected with one file, and this is a mix of 2"),
        (f"{one},{tmp_path}/none.jsonl", {}, "^task=.*none.jsonl: expected a .jsonl file"),
        (f"{one},{other}", {"weights": "choice"}, "language.*: expected names of the task's rewards, choice"),
        (
            f"parity:24,{one}",
            {"weights": "choice:1,language:1"},
            "^rewards: expected accuracy among them, for parity:24",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            open_task(spec, **options)
    with pytest.raises(ConfigError, match=r"^rewards: accuracy:2 of weighed, and 1 of a task before it; expected one"):
        TaskMix([Weighed(1), Weighed(2)], [1, 1])
