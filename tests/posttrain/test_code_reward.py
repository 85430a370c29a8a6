"""Programs cut out of answers and judged by what they print."""

import shutil

import pytest

from dsjax.posttrain.rewards.code import code_reward, last_program

ADD = "```python\na, b = map(int, input().split())\nprint(a + b)\n```"
TESTS = [("1 2\n", "3"), ("-1 1\n", "0\n\n")]


def test_the_last_program_behind_the_thinking():
    assert last_program(f"<think>{ADD}</think> none") is None
    assert last_program("```\nx\n```\n```cpp\ny\n```") == "x\n"
    assert last_program(f"```py\nfirst\n```\n{ADD}\nDone.").startswith("a, b")
    assert last_program("```python\nprint('```')\n```") == "print('```')\n"
    assert last_program("```python\nnot ended") is None
    assert last_program(f"{ADD}\nIt prints\n```\n3\n```").startswith("a, b")
    assert last_program("1. So:\n   ```python\n   if x:\n     y\n\n   ```\n") == "if x:\n  y\n\n"


def test_a_program_is_judged_by_its_output():
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    assert code_reward(ADD, TESTS) == 1
    assert code_reward(ADD.replace("a + b", "3"), TESTS) == 0
    assert code_reward(ADD + "\n```python\n1/0\n```", TESTS) == 0
    assert code_reward("```python\nprint(3)\nraise SystemExit(1)\n```", TESTS[:1]) == 0
    assert code_reward("no program", TESTS) == 0
    with pytest.raises(ValueError, match="tests"):
        code_reward(ADD, [])
