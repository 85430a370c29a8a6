"""The claim of distillation: its arithmetic, what holds, that both students get the same, and one small run of it."""

import json

import jax
import pytest
from click.testing import CliRunner

from dsjax.claims import distillation as claim
from dsjax.claims.r1_zero import base_model
from dsjax.cli import cli
from dsjax.config import ConfigError, replace, save
from dsjax.plan.count import parameters, train_flops
from dsjax.posttrain.evaluate import Answer
from dsjax.train import layout, metrics

STUDENT = claim.student_model(0, 300)


def seed(taught, alone, number=0):
    of = {"sampled_accuracy": 0.5, "chain_share": 0.25, "mean_length": 7.5}
    models = {"before": 0.5, "alone": alone, "taught": taught}
    measured = {name: {"accuracy": a, **of} for name, a in models.items()}
    flops = {"traces": 1e9, "sft": 2e9, "alone": 3.1e9}
    return {"seed": number, **measured, "flops": flops, "curve": [(0.0, 0.5), (3.1e9, alone)]}


@pytest.mark.parametrize(
    ("seeds", "holds"),
    [
        ([(1.0, 0.5), (1.0, 0.6), (0.5, 1.0)], True),
        ([(1.0, 0.5), (0.7, 0.65), (0.5, 0.5)], False),
        ([(0.9, 0.6)], True),
        ([(0.9, 0.85), (0.9, 0.6)], False),
    ],
)
def test_it_holds_where_most_taught_students_are_ahead(seeds, holds, tmp_path):
    result = claim.compare([seed(*pair, number=n) for n, pair in enumerate(seeds)])
    assert result["holds"] is holds
    assert result["ahead"] == [taught - alone for taught, alone in seeds]
    result |= {"teacher": {"accuracy": 1.0, "sampled_accuracy": 0.99, "chain_share": 1.0, "mean_length": 25.0}}
    head, rows = claim.table(result | {"teacher_flops": 1e10})
    assert len(rows) == 1 + 3 * len(seeds) and {len(row) for row in rows} == {len(head)}
    assert rows[0] == ("teacher", "", "100.0%", "99.0%", "100.0%", "25.0", "1.00e+10")
    assert rows[3][0] == "taught" and rows[3][-1] == "3.00e+09" and rows[2][-1] == "3.10e+09"
    claim.draw(result, tmp_path / "claim.png")
    assert (tmp_path / "claim.png").stat().st_size > 10_000


def test_a_forward_pass_is_a_third_and_every_token_is_counted():
    model, length = STUDENT.model, 52
    attention = 3 * model.num_hidden_layers * model.num_attention_heads * length * (model.qk_head_dim + 16) / 3
    whole = 2 * parameters(model).active_body_head + attention
    assert claim.forward_flops(model, 10, length) == pytest.approx(10 * whole)
    answers = [Answer(0, 0, "", "stop", 26, 0.0), Answer(0, 1, "", "length", 2, 0.0)]
    teacher, student = base_model(0), replace(STUDENT, steps=5, batch_size=64, seq_len=56)
    cost = claim.teaching_flops(teacher, student, answers, 24)
    assert cost["traces"] == pytest.approx(train_flops(teacher.model, 52) / 3 * (2 * 26 + 28))
    assert cost["sft"] == pytest.approx(train_flops(model, 56) * 5 * 64 * 56)
    one = claim.step_flops(replace(STUDENT, batch_size=8), 40, 24)
    assert one == pytest.approx(train_flops(model, 52) * 4 / 3 * (8 * 26 + 40))


def test_the_student_alone_learns_until_as_much_is_spent(tmp_path, monkeypatch):
    """Answers that grow longer make steps dearer: their number is corrected."""
    asked, student, run = [], tmp_path / "student", tmp_path / "alone"
    student.mkdir(), run.mkdir()
    save(replace(STUDENT, batch_size=256), student / "config.json")

    def reinforced(base, run, steps, say):
        asked.append(steps)
        save(replace(STUDENT, batch_size=256), run / "config.json")
        rows = [{"kind": "train", "step": n, "answer_tokens": 256 * (2 + n // 2)} for n in range(1, steps + 1)]
        lost = {"kind": "train", "step": steps + 1, "answer_tokens": 256}  # by a kill before it was saved
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, lost]))
        (run / "checkpoints" / str(steps)).mkdir(parents=True)

    monkeypatch.setattr(claim, "_reinforced", reinforced)
    budget = 40 * claim.step_flops(replace(STUDENT, batch_size=256), 256 * 12, 24)
    _, spent = claim._alone(student, run, budget, print)
    assert budget <= spent < 1.05 * budget and 1 < len(asked) < 6
    assert claim._alone(student, run, budget, print)[1] == spent  # it is there
    assert claim.rl_flops(tmp_path / "none") == 0


def test_a_folder_keeps_its_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "reasoner", lambda *_: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            claim.test(tmp_path / "out", 1, print)
    with pytest.raises(ConfigError, match=r"out: its trainings are of chains=0.02, not 0.1; choose another --out"):
        claim.test(tmp_path / "out", 1, print, claim.Sizes(chains=0.1))


def test_the_student_is_the_smaller():
    assert parameters(STUDENT.model).active_body < parameters(base_model(0).model).active_body / 2.5
    assert STUDENT.seq_len == base_model(0).seq_len


@pytest.mark.slow
def test_all_of_it_in_small(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "devices", lambda: jax.devices()[:1])
    monkeypatch.setattr(metrics.Recorder, "draw", lambda *_, **__: None)
    sizes = claim.Sizes(base_steps=80, teacher_steps=2, problems=96, samples=2, epochs=2, asked=8)
    monkeypatch.setattr(claim, "Sizes", lambda **_: sizes)
    out = str(tmp_path / "out")
    result = CliRunner().invoke(cli, ["claims", "distillation", "--seeds", "1", "--out", out, "--json"])
    assert result.exit_code in (0, 1) and isinstance(result.exception, SystemExit | None), result.output
    found = json.loads((tmp_path / "out" / "claim.json").read_text())
    flops = found["seeds"][0]["flops"]
    assert flops["alone"] >= flops["traces"] + flops["sft"] and (tmp_path / "out" / "claim.png").is_file()
