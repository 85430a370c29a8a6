"""The training loop in its run folder: resuming, stopping, refusing; what it writes and says."""

import contextlib
import functools
import itertools
import json
import os
import re
import shutil
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from dsjax import config as configuration
from dsjax.config import ConfigError, FaultsConfig, OptimizerConfig, Phase, replace
from dsjax.data.pipeline import TrainRows, train_rows
from dsjax.model import moe
from dsjax.train import curves, digest, heldout, layout, lines, loop, page
from dsjax.train.lines import read_lines

# What a failed read or write of a checkpoint leaves behind in its threads.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@functools.cache
def compiled(make, config):
    return make(config)


def share(patch):
    """One device, and one compilation for all runs that differ only in what the loop does with them."""
    patch.setattr(layout, "devices", lambda: jax.devices()[:1])
    for name in ("jit_train_step", "jit_init_state"):
        make = getattr(loop, name)
        patch.setattr(loop, name, lambda config, make=make: compiled(make, runs.essence(config)))
    for module in (loop, heldout):
        patch.setattr(module, "abstract_state", runs.like)
    patch.setattr(loop.Recorder, "draw", lambda *_, **__: None)


@pytest.fixture(scope="module", autouse=True)
def compiled_programs(tmp_path_factory):
    with runs.compiled_once(tmp_path_factory):
        yield


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    share(monkeypatch)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return runs.write_texts(tmp_path_factory.mktemp("corpus") / "texts")


@pytest.fixture(scope="module")
def whole(texts, tmp_path_factory):
    """A run from its first to its last step, and its configuration."""
    folder, config = tmp_path_factory.mktemp("whole") / "run", runs.micro(texts)
    with pytest.MonkeyPatch.context() as patch:
        share(patch)
        loop.train(config, folder, quiet=True)
    return folder, config


def at_step(monkeypatch, step: int, act):
    """Calls `act` when this many steps have been sent to the devices, and the next batch is fetched."""
    start = loop.Run._batch
    taken = iter(range(1000))

    def batch(self, arrays):
        if next(taken) == step:
            act()
        return start(self, arrays)

    monkeypatch.setattr(loop.Run, "_batch", batch)


class Killed(BaseException):
    """As kill -9, but for this process."""


def die():
    raise Killed


@pytest.mark.parametrize("step", [2, 5])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(whole, tmp_path, monkeypatch, step):
    folder, config = whole
    with monkeypatch.context() as patch:
        at_step(patch, step, die)
        with pytest.raises(Killed):
            loop.train(config, tmp_path, quiet=True)
    loop.train(config, tmp_path, quiet=True)
    runs.assert_same_run(folder, tmp_path, config)


@pytest.mark.slow
def test_a_step_whose_rows_find_no_room_is_taken_again_and_the_run_is_the_same(whole, tmp_path, monkeypatch, capsys):
    folder, config = whole
    monkeypatch.setattr(layout, "devices", lambda: jax.devices()[:2])
    monkeypatch.setattr(moe, "CHEAP_BYTES", 0)
    compute, mesh = replace(config.compute, expert_buffer=0.7), replace(config.mesh, fsdp=1, expert=2)
    loop.train(replace(config, compute=compute, mesh=mesh), tmp_path, quiet=True)
    assert "rows had no room on their experts' devices (--compute.expert-buffer=0.7)" in capsys.readouterr().err
    for row, wanted in zip(runs.rows(tmp_path), runs.rows(folder), strict=True):
        assert (row["kind"], row["step"]) == (wanted["kind"], wanted["step"])
        for name in {"loss", "heldout_nats", "grad_norm"} & set(wanted):
            assert row[name] == pytest.approx(wanted[name], rel=1e-4)
        if row["kind"] == "train":
            assert (row["tokens"], row["overflow"]) == (wanted["tokens"], 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step_between_two_rows(whole, tmp_path, monkeypatch, capsys, number):
    folder, config = whole
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda: os.kill(os.getpid(), number))
        loop.train(config, tmp_path, quiet=True)
    name = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}[number]
    assert f"{name}: saved at step 5; `dsjax train {tmp_path}` goes on from there" in capsys.readouterr().err
    assert [row["step"] for row in runs.rows(tmp_path)] == [2, 3, 4]
    loop.train(config, tmp_path, quiet=True)
    runs.assert_same_run(folder, tmp_path, config)


def test_a_second_ctrl_c_does_not_wait(tmp_path, texts, monkeypatch):
    at_step(monkeypatch, 1, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        loop.train(runs.micro(texts), tmp_path, quiet=True)


def test_a_signal_before_the_first_step_ends_the_run_at_once(tmp_path, texts, monkeypatch, capsys):
    monkeypatch.setattr(loop, "load_corpus", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    assert loop.train(runs.micro(texts), tmp_path, quiet=True) == {}
    assert "SIGTERM: ended before a step was taken" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_finished_run_says_so_and_takes_more_steps(whole, tmp_path, capsys, monkeypatch):
    folder, config = whole
    shutil.copytree(folder, tmp_path / "run")
    drawn = []
    monkeypatch.setattr(loop.Recorder, "draw", lambda self, at_once=False: drawn.append((len(self.rows), at_once)))
    result = loop.train(config, tmp_path / "run", quiet=True)
    # A kill may have come between the last checkpoint and its picture.
    assert drawn == [(len(list(read_lines(folder / "metrics.jsonl"))), True)]
    assert "6 of 6 steps are done" in capsys.readouterr().err
    assert result["step"] == 6
    assert loop.train(config, tmp_path / "run", quiet=True, explicit={"steps": "8"})["step"] == 8
    assert "changed: steps from 6 to 8" in capsys.readouterr().err
    assert configuration.load(tmp_path / "run/config.json").steps == 8


def test_rows_of_metrics(whole):
    folder, config = whole
    first, *rows = read_lines(folder / "metrics.jsonl")
    assert (first["kind"], first["layers"]) == ("run", ["layer 2", "MTP 1"])
    assert first["facts"]["python"] and len(first["facts"]["sha256"]) == 64
    assert [(row["kind"], row["step"]) for row in rows] == [
        ("train", 2), ("eval", 3), ("train", 4), ("train", 6), ("eval", 6),
    ]  # fmt: skip
    tokens = 2 * config.batch_size * config.seq_len
    for row in rows:
        if row["kind"] == "train":
            assert row["tokens"] == row["step"] * config.batch_size * config.seq_len
            for layer in row["load"]:  # every real token goes to two of the experts
                assert 0.9 * 2 * tokens < sum(layer) <= 2 * tokens
            assert row["tokens_per_s"] > 0
    assert rows[-1]["heldout_nats"] < rows[1]["heldout_nats"] < np.log(262)


def test_quiet_is_one_line_an_interval(whole, tmp_path, capsys, texts):
    loop.train(runs.micro(texts), tmp_path / "run", quiet=True)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["2/6:", "3", "4/6:", "6/6:", "6"]
    assert all("loss" in line for line in lines)
    assert all(re.search(r"tok/s, input \d+ ms, 0:0", line) for line in lines if "/6:" in line)


def broken(step_fn, bad: set[int]):
    """A step whose gradients are NaN at these steps."""

    def call(state, batch, knobs):
        if int(state.step) in bad:
            state = jax.tree.map(lambda a: a, state)
            knobs = type(knobs)(**{**vars(knobs), "mtp_weight": float("nan")})
        return step_fn(state, batch, knobs)

    return call


@pytest.mark.parametrize("log_every", [1, 2])
def test_steps_with_nan_are_skipped_counted_and_then_end_the_run(texts, tmp_path, monkeypatch, capsys, log_every):
    make = loop.jit_train_step
    monkeypatch.setattr(loop, "jit_train_step", lambda config: broken(make(config), {1, 4, 5, 6, 7, 8}))
    config = runs.micro(texts, steps=20, max_skipped_steps=3, log_every=log_every)
    with pytest.raises(ConfigError) as error:
        loop.train(config, tmp_path, quiet=True)
    assert "NaN or Inf in the loss or gradients of 3 steps in a row" in str(error.value)
    assert "checkpoint 6 is intact" in str(error.value) and "\n" not in str(error.value)
    rows = list(read_lines(tmp_path / "metrics.jsonl"))
    assert next(row for row in rows if row["step"] == 2 and row["kind"] == "train")["skipped"] == 1
    assert not any("NaN" in line for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    monkeypatch.setattr(loop, "jit_train_step", make)
    changes = {"steps": 9, "optimizer.peak_lr": 1e-3}
    assert loop.train(config, tmp_path, quiet=True, explicit=changes)["step"] == 9  # intact: it goes on
    assert "changed: optimizer.peak_lr from 0.003 to 0.001" in capsys.readouterr().err


def test_a_learning_rate_far_too_high_ends_the_run(texts, tmp_path):
    config = runs.micro(texts, steps=20, optimizer=OptimizerConfig(peak_lr=1e30, warmup_steps=0, schedule="constant"))
    with pytest.raises(ConfigError, match=r"try an --optimizer.peak-lr below 1e\+30"):
        loop.train(config, tmp_path, quiet=True)


def averaged(config, where):
    return replace(config, optimizer=replace(config.optimizer, ema_decay=0.7, ema_on=where))


def assert_follows(run_folder, config, steps):
    """Each step's average is 0.7 of the one before and 0.3 of the step's weights."""
    states = [runs.state(run_folder, config, step) for step in steps]
    for before, state in itertools.pairwise(states):
        for name in (name for name in state if name.startswith("ema/")):
            wanted = 0.7 * before[name] + 0.3 * state[name.replace("ema/", "model/")]
            np.testing.assert_allclose(state[name], wanted, rtol=1e-6, atol=1e-8, err_msg=name)


@pytest.mark.slow
def test_the_average_on_the_host_follows_each_step_after_a_kill_too(texts, tmp_path, monkeypatch):
    config = averaged(runs.micro(texts, checkpoint_every=1, keep_checkpoints=6), "host")
    loop.train(config, tmp_path / "a", quiet=True)
    assert_follows(tmp_path / "a", config, range(1, 7))
    with monkeypatch.context() as patch:
        at_step(patch, 5, die)
        with pytest.raises(Killed):
            loop.train(config, tmp_path / "b", quiet=True)
    loop.train(config, tmp_path / "b", quiet=True)
    runs.assert_same_run(tmp_path / "a", tmp_path / "b", config)


@pytest.mark.slow
def test_an_average_moves_between_host_and_devices(texts, tmp_path):
    host, device = (
        averaged(runs.micro(texts, checkpoint_every=1, keep_checkpoints=9), on) for on in ("host", "device")
    )
    loop.train(host, tmp_path, quiet=True)
    loop.train(host, tmp_path, quiet=True, explicit={"steps": 8, "optimizer.ema_on": "device"})
    loop.train(device, tmp_path, quiet=True, explicit={"steps": 9, "optimizer.ema_on": "host"})
    assert_follows(tmp_path, device, range(1, 10))


@pytest.mark.slow
def test_every_option_at_once_resumes_too(texts, tmp_path, monkeypatch):
    config = runs.micro(
        texts,
        accumulate=4,
        batch_size_start=2,
        batch_ramp_tokens=700,
        optimizer=OptimizerConfig(
            name="muon",
            peak_lr=3e-3,
            warmup_steps=2,
            schedule="phases",
            phases=(Phase("constant", 0.7, 1.0), Phase("cosine", 1.0, 0.1)),
            moments_dtype="bfloat16",
            ema_decay=0.5,
            ema_on="host",
        ),
        model=replace(runs.micro(texts).model, num_nextn_predict_layers=0),
        data=replace(runs.micro(texts).data, fim_rate=0.5, packing="best_fit", document_mask=False),
        compute=replace(runs.micro(texts).compute, precision="bf16"),
    )
    loop.train(config, tmp_path / "a", quiet=True)
    with monkeypatch.context() as patch:
        at_step(patch, 5, die)
        with pytest.raises(Killed):
            loop.train(config, tmp_path / "b", quiet=True)
    loop.train(config, tmp_path / "b", quiet=True)
    runs.assert_same_run(tmp_path / "a", tmp_path / "b", config)
    rows = runs.rows(tmp_path / "a")
    last = rows[-1]
    assert last["ema_heldout_nats"] != last["heldout_nats"]
    tokens = [row["tokens"] // config.seq_len for row in rows if row["kind"] == "train"]
    assert tokens[0] == 4 and tokens == sorted(tokens)
    assert tokens[-1] == loop.Schedule(config).first_row(6)
    assert runs.state(tmp_path / "a", config)["model/head"].dtype == np.float32  # the master


def test_evaluate_equals_the_runs_own_numbers(whole):
    folder, _ = whole
    logged = [row for row in runs.rows(folder) if row["kind"] == "eval"]
    for step, row in ((None, logged[-1]), (3, logged[0])):
        result = loop.evaluate(folder, step=step)
        assert {name: result[name] for name in row if name != "kind"} == {k: v for k, v in row.items() if k != "kind"}
    assert result["heldout_documents"] == 8


def test_evaluate_measures_all_of_another_text_and_leaves_the_run_alone(whole, tmp_path):
    folder, config = whole
    other = tmp_path / "other.txt"
    other.write_text("return self\n" * 50)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    result = loop.evaluate(folder, {"data.sources": str(other)})
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert (result["heldout_documents"], result["heldout_bytes"]) == (1, 600)
    assert result["heldout_tokens"] == 600
    # its own held-out text, as if it were another's
    _, heldout = (loop.load_corpus(config.data, 262, folder, progress=False).__dict__[k] for k in ("train", "heldout"))
    own = tmp_path / "own"
    own.mkdir()
    tokenizer = loop.load_corpus(config.data, 262, folder, progress=False).tokenizer
    for i in range(len(heldout)):
        (own / f"{i}.txt").write_text(tokenizer.decode(heldout[i]))
    again = loop.evaluate(folder, {"data.sources": str(own)})
    np.testing.assert_allclose(again["heldout_bpb"], loop.evaluate(folder)["heldout_bpb"], rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.hidden_size": 64},
            r"model.hidden_size=64: an evaluation cannot change it; it can change data.sources",
        ),
        ({"data.tokenizer": "bpe"}, r"data.tokenizer=bpe: an evaluation cannot change it"),
        ({"data.sources": "nowhere.txt"}, r"data.sources=nowhere.txt: no such file or folder"),
        ({"mesh.expert": 3}, r"mesh: expert=3 does not divide the 1 devices"),
    ],
)
def test_evaluate_refuses_what_makes_it_another_model(whole, changes, message):
    with pytest.raises(ConfigError, match=message):
        loop.evaluate(whole[0], changes)


def test_evaluate_names_the_checkpoints_there_are(whole):
    with pytest.raises(ConfigError, match="expected checkpoint 5, there are: 3, 6"):
        loop.evaluate(whole[0], step=5)


@pytest.fixture
def run_folder(whole, tmp_path):
    """A copy of the finished run, to be spoilt."""
    return shutil.copytree(whole[0], tmp_path / "run")


@pytest.mark.parametrize(
    ("explicit", "message"),
    [
        (
            {"model.hidden_size": "64"},
            "model.hidden_size=64: the run in .* has 32 and cannot change it; choose another",
        ),
        ({"batch_size": "16"}, "batch_size=16: the run in .* has 8 and cannot change it"),
        ({"optimizer.ema_decay": "0.9"}, "optimizer.ema_decay=0.9: the run in .* has none and cannot change it"),
        ({"optimizer.name": "muon"}, "optimizer.name=muon: the run in .* has adamw and cannot change it"),
        ({"data.tokenizer": "bpe"}, "data.tokenizer=bpe: the run in .* has bytes and cannot change it"),
        ({"seed": "1"}, "seed=1: the run in .* has 0 and cannot change it"),
    ],
)
def test_a_run_cannot_become_another_one(whole, run_folder, explicit, message):
    before = (run_folder / "config.json").read_bytes()
    with pytest.raises(ConfigError, match=message):
        loop.train(whole[1], run_folder, quiet=True, explicit=explicit)
    assert (run_folder / "config.json").read_bytes() == before


def test_the_folder_of_another_preset_is_refused(whole, run_folder):
    with pytest.raises(ConfigError, match="holds a run of preset micro, not other; choose another --run"):
        loop.train(replace(whole[1], name="other"), run_folder, quiet=True)


def test_a_folder_in_use_is_refused(whole, run_folder):
    with loop.owned(run_folder), pytest.raises(ConfigError, match="another process is training here"):
        loop.train(whole[1], run_folder, quiet=True)


def test_text_that_has_changed_is_refused(whole, run_folder, tmp_path):
    _, config = whole
    texts = shutil.copytree(config.data.sources[0], tmp_path / "texts")
    saved = replace(config, data=replace(config.data, sources=(str(texts),)))
    configuration.save(saved, run_folder / "config.json")
    (texts / "000.txt").write_text("other words")
    with pytest.raises(ConfigError, match=r"not the text that the run in .* began with \(sha256 is"):
        loop.train(saved, run_folder, quiet=True, explicit={"steps": "8"})


def test_a_lost_tokenizer_is_made_again(whole, run_folder):
    for lost in (run_folder / "tokenizer.json", run_folder / "data"):
        lost.unlink() if lost.is_file() else shutil.rmtree(lost)
    assert loop.train(whole[1], run_folder, quiet=True)["step"] == 6


@pytest.mark.parametrize("text", ["", "{", "[]", '{"name": 3}', '{"model": {"hidden_siz": 3}}', "\ufffd"])
def test_a_damaged_configuration_is_named(whole, run_folder, text):
    (run_folder / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json") as error:
        loop.train(whole[1], run_folder, quiet=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("how", ["cut", "zeros", "no metadata", "no item"])
def test_a_damaged_checkpoint_is_passed_over_and_an_older_one_serves(whole, run_folder, how, capsys):
    folder, config = whole
    checkpoint = run_folder / "checkpoints/6"
    for path in [p for p in checkpoint.rglob("*") if p.is_file()]:
        if how == "cut" and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        if how == "zeros" and path.parent.name == "d":
            path.write_bytes(bytes(path.stat().st_size))
        if how == "no metadata" and path.name in ("_METADATA", "manifest.ocdbt"):
            path.unlink()
    if how == "no item":
        shutil.rmtree(checkpoint / "rest")
    loop.train(config, run_folder, quiet=True, explicit={"steps": "6"})
    said = capsys.readouterr().err
    assert (
        f"checkpoint 6 passed over, moved to {run_folder / 'damaged'}: " in said
        and "this checkpoint is damaged" in said
    )
    assert f"resuming {run_folder} at step 3" in said
    assert (run_folder / "damaged" / "6").is_dir()
    runs.assert_same_run(folder, run_folder, config)
    incidents = [row["kind"] for row in read_lines(run_folder / "incidents.jsonl")]
    assert incidents[-2:] == ["checkpoint", "resume"]


def test_where_no_checkpoint_can_be_read_all_stay_where_they_are(whole, run_folder):
    for path in run_folder.glob("checkpoints/*/model/d/*"):
        path.write_bytes(b"")
    with pytest.raises(
        ConfigError, match=r"checkpoints/6: this checkpoint is damaged.*; so are the older ones"
    ) as error:
        loop.train(whole[1], run_folder, quiet=True, explicit={"steps": "8"})
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in (run_folder / "checkpoints").iterdir()) == ["3", "6"]


def test_a_folder_without_a_checkpoint_takes_new_settings(texts, tmp_path, monkeypatch):
    config = runs.micro(texts)
    bigger = replace(config, name="other", model=replace(config.model, vocab_size=300))
    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "go", lambda *_: die())
        with pytest.raises(Killed):
            loop.train(replace(bigger, data=replace(config.data, tokenizer="bpe")), tmp_path, quiet=True)
    loop.train(config, tmp_path, quiet=True)
    assert configuration.load(tmp_path / "config.json") == config
    assert [row["kind"] for row in read_lines(tmp_path / "metrics.jsonl")].count("run") == 1


def test_a_run_goes_on_while_the_disk_is_full(whole, run_folder, monkeypatch, capsys):
    from dsjax.train import checkpoint

    def fail(*_, **__):
        raise ValueError("INTERNAL: writing: No space left on device\nSource locations:\n  file.cc:12")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.ocp.CheckpointManager, "save", fail)
        with pytest.raises(
            ConfigError, match=r"step 8 is not saved \(No space left on device\); .*from step 6"
        ) as error:
            loop.train(whole[1], run_folder, quiet=True, explicit={"steps": "8", "checkpoint_every": "1"})
    assert "\n" not in str(error.value)
    said = capsys.readouterr().err
    assert (
        said.count("checkpoint 7 could not be written (No space left on device); the older ones are intact (3, 6)") == 1
    )
    assert "step 8/8: loss" in said
    loop.train(whole[1], run_folder, quiet=True)
    assert sorted(path.name for path in (run_folder / "checkpoints").iterdir()) == ["7", "8"]


def test_a_sample_continues_a_heldout_document(whole, run_folder, capsys):
    def sampler(model, router_bias, tokenizer, config, prompt, *, max_tokens, temperature, top_p, seed):
        assert len(tokenizer.encode(prompt)) + 1 + max_tokens <= config.model.max_position_embeddings
        yield from (prompt[:3], "\x1b[2J!")

    loop.train(whole[1], run_folder, quiet=True, explicit={"steps": "7"}, sampler=sampler)
    assert "step 7: sample " in (err := capsys.readouterr().err)
    assert "\x1b" not in err


def test_a_wrong_mesh_shows_its_arithmetic(texts, tmp_path):
    for mesh, message in (
        ({"expert": 3}, "mesh: expert=3 does not divide the 1 devices; the nearest that does is expert=1"),
        ({"fsdp": 2}, "mesh: fsdp=2, but there are 1 devices; the nearest that fits is fsdp=1"),
    ):
        config = runs.micro(texts)
        with pytest.raises(ConfigError, match=message):
            loop.train(replace(config, mesh=replace(config.mesh, **mesh)), tmp_path, quiet=True)


def test_a_mesh_that_does_not_divide_the_model_names_the_field(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "devices", jax.devices)
    for mesh, message in (
        ({"tensor": 8, "fsdp": 1}, "mesh: tensor=8 does not divide model.num_attention_heads = 2"),
        ({"stage": 8, "fsdp": 1}, "mesh: stage=8 does not divide the number of pipeline stages = 1"),
        ({"context": 8, "fsdp": 1}, None),
    ):
        config = runs.micro(texts)
        config = replace(config, mesh=replace(config.mesh, **mesh))
        if message is None:
            assert layout.device_mesh(config).shape["context"] == 8
        else:
            with pytest.raises(ConfigError, match=message):
                layout.device_mesh(config)


def test_configurations_are_json_of_this_run(whole):
    folder, config = whole
    assert configuration.from_dict(json.loads((folder / "config.json").read_text())) == config
    assert jnp.asarray(0).dtype == jnp.int32


def spike_in(monkeypatch, *steps: int):
    """The rows of these steps, as the data gives them, make every step that reads one of them a spike."""
    make = loop.jit_train_step

    def spiky(config):
        step_fn = make(config)

        def call(state, batch, knobs):
            state, metrics = step_fn(state, batch, knobs)
            return state, metrics.replace(spike=bool(here & set(map(bytes, np.asarray(batch.tokens[0])))))

        return call

    here: set[bytes] = set()

    def rows(*args):
        made = train_rows(*args)
        here.update(made[8 * step + i]["tokens"].tobytes() for step in steps for i in range(8))
        return made

    monkeypatch.setattr(loop, "jit_train_step", spiky)
    monkeypatch.setattr(loop, "train_rows", rows)


def rolling(texts, **changes):
    return runs.micro(texts, steps=12, faults=FaultsConfig(on_spike="rollback", rollback_steps=2), **changes)


@pytest.fixture(scope="module")
def rolled(texts, tmp_path_factory):
    """A run with a spike in its eighth step, which went back."""
    folder, config = tmp_path_factory.mktemp("rolled") / "run", rolling(texts)
    with pytest.MonkeyPatch.context() as patch:
        share(patch)
        spike_in(patch, 7)
        loop.train(config, folder, quiet=True)
    return folder, config


def test_a_rollback_passes_over_the_documents_and_leaves_a_run_that_never_saw_them(rolled, tmp_path):
    folder, config = rolled
    (entry,) = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert (entry["step"], entry["from_step"], entry["rows"]) == (8, 5, [40, 64])
    kinds = [row["kind"] for row in read_lines(folder / "incidents.jsonl")]
    assert kinds == ["spike", "resume", "rollback"]
    facts = json.loads((folder / "spikes" / "step-00000008.json").read_text())
    assert facts["rows"] == list(range(56, 64)) and len(facts["documents"]) == 8 and all(facts["documents"])
    assert np.sqrt(np.sum(np.square(list(facts["grad_norm_of"].values())))) == pytest.approx(
        facts["grad_norm"], rel=1e-5
    )
    assert "model/head" in facts["grad_norm_of"] or "head" in facts["grad_norm_of"]
    shutil.copy(folder / "skipped.jsonl", tmp_path)  # a run that passes over the same rows from its start
    loop.train(config, tmp_path, quiet=True)
    runs.assert_same_run(folder, tmp_path, config)


@pytest.mark.parametrize("moment", ["drop_after", pytest.param("newest", marks=pytest.mark.slow)])
def test_a_rollback_that_was_killed_is_made_again(rolled, tmp_path, monkeypatch, moment):
    folder, config = rolled
    config = replace(config, checkpoint_every=1)  # so that there are checkpoints from after the rows passed over
    with monkeypatch.context() as patch:
        spike_in(patch, 7)
        calls = iter([False, True] if moment == "newest" else [True])
        work = getattr(loop.Checkpoints, moment)
        patch.setattr(loop.Checkpoints, moment, lambda self, *a: die() if next(calls) else work(self, *a))
        with pytest.raises(Killed):
            loop.train(config, tmp_path, quiet=True)
    loop.train(config, tmp_path, quiet=True)
    assert runs.rows(tmp_path) == runs.rows(folder)


def test_too_many_rollbacks_end_the_run(texts, tmp_path, monkeypatch):
    config = rolling(texts)
    spike_in(monkeypatch, 3, 8, 11)
    config = replace(config, faults=replace(config.faults, max_rollbacks=2))
    with pytest.raises(ConfigError, match=r"a spike after 2 rollbacks \(faults.max_rollbacks\)"):
        loop.train(config, tmp_path, quiet=True)


def test_a_source_that_stalls_saves_and_ends_and_the_run_goes_on(whole, tmp_path, monkeypatch, capsys):
    folder, config = whole
    over = threading.Event()

    class Stuck(TrainRows):
        def __getitem__(self, row):
            return over.wait() if row >= 32 else super().__getitem__(row)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_rows", lambda *args: Stuck(*args[:4]))
        faults = FaultsConfig(stall_warn_s=0.3, stall_stop_s=1)
        with pytest.raises(ConfigError, match=r"no batch for 1 s .*texts does not answer"):
            loop.train(replace(config, faults=faults), tmp_path, quiet=True)
        over.set()
    assert f"waiting for data.sources={config.data.sources[0]}" in capsys.readouterr().err
    loop.train(config, tmp_path, quiet=True)
    assert f"resuming {tmp_path} at step 4" in capsys.readouterr().err
    runs.assert_same_run(folder, tmp_path, config)


def test_the_best_and_every_third_checkpoint_are_kept(whole, tmp_path):
    config = replace(whole[1], steps=9, checkpoint_every=1, keep_checkpoints=1, keep_every=4, keep_best=1)
    loop.train(config, tmp_path, quiet=True)
    losses = {row["step"]: row["heldout_nats"] for row in runs.rows(tmp_path) if row["kind"] == "eval"}
    kept = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {4, 8, 9, min(losses, key=losses.get)}


def test_a_trace_of_some_steps(whole, tmp_path):
    loop.train(whole[1], tmp_path, quiet=True, profile=(2, 3))
    assert list((tmp_path / "tensorboard").rglob("*.xplane.pb"))


def test_time_is_accounted_for(whole):
    rows = list(read_lines(whole[0] / "goodput.jsonl"))
    assert [(row["kind"], row["step"]) for row in rows] == [("start", 0)] + [("interval", n) for n in (2, 4, 6)] + [
        ("end", 6)
    ]
    seconds = {name for row in rows for name in row["seconds"]}
    assert {"restart", "compile", "input", "step", "checkpoint", "eval"} <= seconds
    wall = rows[-1]["time"] - rows[0]["time"]
    assert sum(sum(row["seconds"].values()) for row in rows[1:]) == pytest.approx(wall, abs=0.1)


def test_a_device_that_computes_wrong_ends_the_run(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.CorruptionCheck, "__call__", lambda *_: ["moe/w_up", "head"])
    config = replace(whole[1], faults=FaultsConfig(check_every=2))
    with pytest.raises(
        ConfigError, match=r"step 1: silent data corruption: .* other gradients of moe/w_up, head; test"
    ):
        loop.train(config, tmp_path, quiet=True)
    assert list(read_lines(tmp_path / "incidents.jsonl"))[-1]["kind"] == "corruption"


def test_the_page_of_a_run_holds_its_rows(whole):
    folder, config = whole
    found = digest.Digest(lines.read_lines(folder / "metrics.jsonl"))
    charts = {chart["id"]: chart for chart in curves.charts(found, config)}
    assert set(charts) >= {"loss", "heldout", "grad_norm", "learning_rate", "tokens_per_s", "batch", "mtp_weight"}
    rows = [row for row in runs.rows(folder) if row["kind"] == "train"]
    drawn = next(series["y"] for series in charts["loss"]["series"] if series["name"] == "training")
    np.testing.assert_allclose(drawn, [row["loss"] for row in rows], rtol=1e-4)
    assert charts["batch"]["series"][0]["y"] == [config.batch_size * config.seq_len] * len(rows)
    assert found.loads.shape == np.shape(rows[0]["load"])
    assert found.step == config.steps
    assert "All steps are done." in page.page(folder)


def test_a_phase_goes_on_from_another_run_and_resumes_bit_for_bit(whole, tmp_path, monkeypatch):
    came, config = whole
    phase = replace(
        config, name="phase", steps=4, keep_checkpoints=3, optimizer=OptimizerConfig(peak_lr=1e-3, warmup_steps=0)
    )
    for name in ("one", "killed"):
        with monkeypatch.context() as patch:
            if name == "killed":
                at_step(patch, 2, die)
            with pytest.raises(Killed) if name == "killed" else contextlib.nullcontext():
                loop.train(phase, tmp_path / name, quiet=True, source=came)
        first, last = runs.state(tmp_path / "one", config, 0), runs.state(came, config)
        assert all(np.array_equal(first[name], last[name]) for name in last if name not in ("step", "history"))
        assert first["step"] == 0
    loop.train(phase, tmp_path / "killed", quiet=True)
    runs.assert_same_run(tmp_path / "one", tmp_path / "killed", config)
    assert configuration.load(tmp_path / "one" / "config.json").data.tokenizer == "run"
