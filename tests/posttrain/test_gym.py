"""Problems that reasoning-gym makes and judges; what it would evaluate is not evaluated."""

import os
import time

import pytest

from dsjax.config import ConfigError
from dsjax.posttrain.rewards.gym import Scorers, make_dataset, only_literals, only_mathematics
from dsjax.posttrain.tasks import open_task

pytest.importorskip("reasoning_gym", reason="needs the gym extra")


@pytest.fixture(scope="module")
def scorers():
    with Scorers(1, seconds=2.0) as scorers:
        yield scorers


def test_a_data_set_is_a_task():
    with open_task("gym:chain_sum?max_terms=3&max_digits=2", weights="gym,format:0.5,language:0.1", seed=1) as task:
        problems, held = [task.problem(i) for i in range(200)], {p.prompt for p in task.heldout()}
        assert len(held) > 100 and not held & {p.prompt for p in problems} and len({p.prompt for p in problems}) > 190
        assert all(p.facts["entry"]["metadata"]["num_terms"] <= 3 for p in problems)
        again = task.problem(1500)
        task.problem(5000), task.problem(9000), task.problem(3)
        assert task.problem(1500) == again
        texts = [f"<think>x</think><answer>{problems[0].answer}</answer>", rf"\boxed{{{problems[0].answer}}}", "?"]
        got = task.judge(problems[:1] * 3, texts)
        assert [parts["gym"] for parts in got] == [1, 1, 0] and [parts["format"] for parts in got] == [1, 0, 0]
        with open_task("gym:chain_sum?max_terms=3&max_digits=2", seed=2) as other:
            assert other.weights == {"gym": 1} and other.problem(0) != problems[0]
            assert {p.prompt for p in other.heldout()} == held


def test_what_is_no_data_set(monkeypatch):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    for spec, message in (
        ("gym:chain_summ", "gym:chain_summ: no such data set; the nearest is gym:chain_sum"),
        ("gym:chain_sum?max_term=3", "gym:chain_sum: max_term: no such option; the nearest is max_terms"),
        ("gym:chain_sum?max_terms", "gym:chain_sum: max_terms: expected an option as in max_terms=4"),
        ("gym:chain_sum?max_terms=1", "gym:chain_sum: .*max_terms must be >= min_terms"),
        ("gym:chain_sum?seed=1", "gym:chain_sum: seed: no such option"),
        ("gym:ransom_note", "gym:ransom_note: expected PYTHONHASHSEED=0 in the environment"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_task(spec)
    with pytest.raises(ConfigError, match=r"gym:chain_sum: answer=.*: expected a letter, for the reward choice"):
        open_task("gym:chain_sum", weights="choice")


def test_where_the_package_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"gym: needs reasoning-gym, which is not here: pip install 'dsjax\[gym\]'"):
        open_task("gym:chain_sum")


@pytest.mark.parametrize(
    "name", ["string_insertion", "spiral_matrix", "bitwise_arithmetic", "countdown", "simple_integration"]
)
def test_right_answers_of_data_sets_that_evaluate(scorers, name):
    entry = make_dataset(name, {"seed": 1})[0]
    assert scorers.score(name, {}, entry, entry["answer"]) == 1
    assert scorers.score(name, {}, entry, "no") < 0.1


def test_what_sympy_parses_for_itself_is_not_refused(scorers):
    entry = make_dataset("intermediate_integration", {"seed": 1, "size": 30})[27]
    assert entry["metadata"]["integrand"] == "-(9*x + 10)**2"  # is simplified, for which sympy imports its units
    assert scorers.score("intermediate_integration", {}, entry, entry["answer"]) == 1


@pytest.mark.parametrize("name", ["string_insertion", "n_queens", "countdown", "polynomial_multiplication"])
def test_nothing_that_a_model_writes_is_run(scorers, tmp_path, name):
    entry, mark = make_dataset(name, {"seed": 1})[0], tmp_path / "mark"
    for hostile in (
        f"open({str(mark)!r}, 'w')", f"__import__('os').mkdir({str(mark)!r})",
        f"[*map(__import__('os').mkdir, [{str(mark)!r}])]",
        f"S('__import__(\"os\").mkdir(\"{mark}\")')", f"sin(exec('import os; os.mkdir(\"{mark}\")'))",
    ):  # fmt: skip
        assert scorers.score(name, {}, entry, hostile) < 0.1
    assert not mark.exists() and os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "answer", ["0x{target:x} # {numbers}", "{target} # {numbers}", "{target}e0+0e0*({sum})", "(x-x)*({sum})+{ones}"]
)
def test_countdown_is_not_won_by_numbers_that_do_not_count(scorers, answer):
    entry = make_dataset("countdown", {"seed": 1})[0]
    target, numbers = entry["metadata"]["target"], entry["metadata"]["numbers"]
    text = answer.format(
        target=target,
        numbers=" ".join(map(str, numbers)),
        sum="+".join(map(str, numbers)),
        ones="+".join(["x/x"] * target),
    )
    assert scorers.score("countdown", {}, entry, text) < 0.1


def test_what_takes_for_ever_is_worth_nothing(scorers):
    entry, before = make_dataset("countdown", {"seed": 1})[0], scorers.killed
    began = time.monotonic()
    assert scorers.score("countdown", {}, entry, "9**9**9**9**9") == 0
    assert scorers.killed == before + 1 and time.monotonic() - began < 20
    assert scorers.score("countdown", {}, entry, entry["answer"]) == 1
    assert scorers.score("countdown", {}, entry, "1" * 100_000) == 0


def test_what_is_let_through():
    literal, mathematics = only_literals(lambda text: "done"), only_mathematics(lambda text, local_dict=None: "done")
    for text in ("[1, 'a', (2,)]", "0x3 + (5 << 2)", "{'a': -1}", " 3 "):
        assert literal(text) == "done"
    for text in ("x**2/3 + C", "sin(x) - log(2*x)", "94*4 - 61", "2.5"):
        assert mathematics(text, local_dict={}) == "done"
    for text in ("x", "f(1)", "[i for i in 'a']", "(lambda: 1)()", "a.b", "f'{x}'", "'a'.join('b')", "1 if 2 else 3"):
        with pytest.raises(ValueError):
            literal(text)
    for text in ("0x135 # 6 61 94 4", "1_0", "0b1", "0O7", "1e3", "x # y"):
        with pytest.raises(ValueError):
            mathematics(text)
    for text in ("open(x)", "sin.x", "'x'", "sin('x')", "x(1)", "sin(x=1)", "[x]", "eval", "S('x')", "sin(x)(y)"):
        with pytest.raises(ValueError):
            mathematics(text)
    for wrong in ("", "1 +", 3, None):
        with pytest.raises((ValueError, SyntaxError)):
            mathematics(wrong)
