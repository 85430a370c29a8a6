"""metrics.jsonl, TensorBoard and loss.png: whole lines, no step twice, the same numbers in all three."""

import json
import math

import numpy as np
import pytest
from matplotlib.image import imread

from dsjax.state import Metrics, RouterBias
from dsjax.train.lines import read_lines
from dsjax.train.metrics import Interval, Recorder
from dsjax.train.picture import draw


def metrics(loss=1.0, skipped=0, in_a_row=0, overflow=0, layers=2, depth=1, experts=4) -> Metrics:
    def f(x):
        return np.asarray(x, np.float32)

    load = RouterBias(np.full((layers, experts), 5, np.float32), np.full((depth, experts), 5, np.float32))
    n = layers + depth
    counts = map(np.int32, (overflow, skipped, in_a_row))
    return Metrics(
        f(loss), f([loss] * depth), f(0.1), f(2.0), load, f([0.5] * n), *counts, np.False_, f([2.0, 1.0]), f([1.0])
    )


def test_a_row_is_the_mean_of_its_steps():
    interval = Interval()
    for loss in (1.0, 2.0, 4.5):
        interval.add(metrics(loss))
    row = interval.row()
    assert (row["loss"], row["mtp_loss"], row["max_vio_mean"]) == (2.5, [2.5], 0.5)
    assert row["load"] == [[15] * 4] * 3


def test_rows_left_out_are_summed_over_the_interval():
    interval = Interval()
    for overflow in (3, 0, 4):
        interval.add(metrics(overflow=overflow))
    assert interval.row()["overflow"] == 7


def test_skipped_steps_are_left_out_of_the_mean():
    interval = Interval()
    interval.add(metrics(2.0))
    interval.add(metrics(math.nan, skipped=1, in_a_row=1))
    assert (interval.row()["loss"], interval.row()["skipped"]) == (2.0, 1)


def test_an_interval_goes_through_json_bit_for_bit():
    draw = np.random.default_rng(0)
    losses = draw.normal(size=7).astype(np.float32)
    whole, first = Interval(), Interval()
    for loss in losses:
        whole.add(metrics(loss))
    for loss in losses[:3]:
        first.add(metrics(loss))
    second = Interval(json.loads(json.dumps(first.notes)))
    for loss in losses[3:]:
        second.add(metrics(loss))
    assert second.row() == whole.row()
    assert Interval(json.loads(json.dumps(Interval().notes))).notes == Interval().notes


@pytest.mark.parametrize(("layers", "depth"), [(0, 0), (3, 0), (0, 1)])
def test_models_without_experts_or_mtp(layers, depth):
    interval = Interval()
    for _ in range(2):
        interval.add(metrics(layers=layers, depth=depth))
    row = interval.row()
    assert (len(row["load"]), len(row["max_vio"]), len(row["mtp_loss"])) == (layers + depth, layers + depth, depth)


def record(folder, steps, start=0):
    recorder = Recorder(folder, start)
    for step in steps:
        recorder.write("train", step, {"loss": step / 2, "max_vio": [0.1], "skipped": 0, "name": "x", "none": None})
    recorder.close()


def events(folder):
    """TensorBoard's own reader."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reader = accumulator.EventAccumulator(str(folder / "tensorboard"))
    reader.Reload()
    return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def test_tensorboard_reads_the_same_numbers(tmp_path):
    record(tmp_path, [1, 200, 70_000])
    assert events(tmp_path) == {
        "train/loss": [(1, 0.5), (200, 100.0), (70_000, 35_000.0)],
        "train/skipped": [(1, 0), (200, 0), (70_000, 0)],
    }


def test_a_resumed_run_drops_what_comes_after_its_step(tmp_path):
    record(tmp_path, [1, 2, 3, 4])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # cut short by a kill
    record(tmp_path, [3, 4, 5], start=2)
    assert [row["step"] for row in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert [step for step, _ in events(tmp_path)["train/loss"]] == [1, 2, 3, 4, 5]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_tensorboard_forgets_when_it_reads_along(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    record(tmp_path, [1, 2, 3, 4])
    reader = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    reader.Reload()
    record(tmp_path, [3, 4], start=2)
    reader.Reload()
    assert [e.step for e in reader.Scalars("train/loss")] == [1, 2, 3, 4]


def test_what_was_cut_short_in_tensorboard_is_written_anew(tmp_path):
    record(tmp_path, [1, 2, 3])
    (file,) = (tmp_path / "tensorboard").iterdir()
    file.write_bytes(file.read_bytes()[:-7])
    record(tmp_path, [4], start=3)
    assert [step for step, _ in events(tmp_path)["train/loss"]] == [1, 2, 3, 4]


def test_a_run_that_begins_again_forgets_the_one_that_got_nowhere(tmp_path):
    record(tmp_path, [0, 1, 2])
    record(tmp_path, [0, 1])
    assert [row["step"] for row in read_lines(tmp_path / "metrics.jsonl")] == [0, 1]


def test_lines_are_json_that_every_reader_takes(tmp_path):
    recorder = Recorder(tmp_path, 0)
    row = recorder.write("train", 1, {"loss": math.nan, "max_vio": [math.inf, 1.0], "facts": {"a": -math.inf}})
    recorder.close()
    assert (row["loss"], row["max_vio"], row["facts"]) == (None, [None, 1.0], {"a": None})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=lambda name: pytest.fail(name)) == row


def test_other_processes_write_nothing(tmp_path):
    recorder = Recorder(tmp_path, 0, write=False)
    recorder.write("train", 1, {"loss": 1.0})
    recorder.draw(at_once=True)
    recorder.close()
    assert recorder.last("train")["loss"] == 1.0
    assert not list(tmp_path.iterdir())


def test_a_picture_is_not_drawn_at_every_evaluation(tmp_path):
    recorder = Recorder(tmp_path, 0)
    recorder.draw()
    drawn = (tmp_path / "loss.png").stat().st_mtime_ns
    recorder.draw()
    assert (tmp_path / "loss.png").stat().st_mtime_ns == drawn
    recorder.draw(at_once=True)
    assert (tmp_path / "loss.png").stat().st_mtime_ns > drawn
    recorder.close()


def rows(steps, layers, experts, evals=(), ema=False, mtp=1):
    rng, rows = np.random.default_rng(0), [{"kind": "run", "step": 0, "title": "micro", "layers": ["layer 1"] * layers}]
    for step in steps:
        rows.append(
            {
                "kind": "train",
                "step": step,
                "loss": None if step == 3 else 5.0,
                "mtp_loss": [6.0] * mtp,
                "max_vio": rng.random(layers).tolist(),
                "load": rng.poisson(50, (layers, experts)).tolist(),
            }
        )
        if step in evals:
            row = {"heldout_nats": 5.0, "heldout_bpb": None if step == 3 else 3.0, "gzip_bpb": 2.0, "xz_bpb": 1.9}
            row |= {"ema_heldout_nats": 4.0, "ema_heldout_bpb": 2.9} if ema else {}
            rows.append({"kind": "eval", "step": step, **row})
    return rows


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "case",
    [
        [],
        rows([], 3, 8),
        rows([2], 3, 8),
        rows([2, 4], 3, 8, evals=[4]),
        rows([3], 3, 8, evals=[3]),
        rows([1, 2, 3, 4], 3, 8, evals=[2, 4], ema=True),
        rows([1, 2, 3], 0, 8, evals=[3], mtp=0),
        rows(range(1, 50), 59, 256, evals=[10, 40]),
    ],
    ids=["nothing", "no steps", "one row", "one evaluation", "nan", "averaged", "dense", "v3"],
)
def test_a_picture_of_every_state_of_a_run(tmp_path, case):
    draw(case, tmp_path / "loss.png")
    assert imread(tmp_path / "loss.png").shape[:2] == (935, 1430)
