"""Fine-tuning: the masked loss against NumPy, packed, on micro-batches and devices; runs; and what is refused."""

import functools
import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
import runs
from click.testing import CliRunner

from dsjax import config as configuration
from dsjax.cli import cli
from dsjax.config import Config, ConfigError, GrpoConfig, replace, save
from dsjax.data.chats import load_chats
from dsjax.data.pipeline import TrainRows
from dsjax.data.tokenizer import bytes_tokenizer
from dsjax.posttrain.chats import fingerprint_of
from dsjax.posttrain.sft import RECIPES, import_hub, planned, settings, sft
from dsjax.state import Batch
from dsjax.train import heldout, layout, loop, page, picture
from dsjax.train.checkpoint import Checkpoints
from dsjax.train.loss import count, total_loss
from dsjax.train.phase import Origin, origin
from dsjax.train.schedule import Schedule
from sharding.mesh import make_mesh
from sharding.rules import spec

CONFIG = models.config(models.v3(num_hidden_layers=1, first_k_dense_replace=0))
ROWS = [[7, 6], [16], [3, 4, 5], [10], [16], [8, 8], [2, 3], [9]]
MTP_WEIGHT = 0.3
ONE = {"fsdp": 1}
EIGHT = {"data": 2, "context": 2, "expert": 2}


def masked(rows=ROWS, seed=0) -> Batch:
    """A batch of which a third is learned. Under a mesh."""
    batch = models.pack(rows, seed=seed)
    learned = np.random.default_rng(1).random(batch.tokens.shape) < 0.3
    return batch.replace(learned=jax.device_put(learned, spec("batch", "seq")))


@functools.cache
def program(n_devices: int):
    def losses(model, bias, batch, counts):
        total, parts = total_loss(model, batch, bias, counts, jnp.float32(MTP_WEIGHT), CONFIG)
        return total, parts, model(batch, bias, CONFIG.compute)

    counts = jax.jit(functools.partial(count, depth=1))
    return jax.jit(losses), counts


def losses(batch_of, n=1, sizes=ONE):
    """(the loss of all micro-batches, that of next tokens, that of MTP, outputs of the last) on a mesh."""
    devices = jax.devices()[: math.prod(sizes.values())]
    with jax.set_mesh(make_mesh(devices, **sizes)):
        model, bias = models.draw(CONFIG.model)
        micro = models.micro_batches(batch_of(), n)
        run, counted = program(len(devices))
        counts = counted(micro)
        parts = [run(model, bias, jax.tree.map(lambda a, i=i: a[i], micro), counts) for i in range(n)]
        sums = [float(sum(part)) for part in zip(*((p[0], p[1].loss, p[1].mtp_loss[0]) for p in parts))]
        return (
            sums,
            [np.asarray(h, np.float64) for h in (parts[-1][2].hidden, *parts[-1][2].mtp_hidden)],
            (np.asarray(model.head[...], np.float64)),
        )


def by_hand(batch, hidden, head, n: int) -> tuple[float, int]:
    """Sum and number of the losses of learned tokens n ahead, in the same conversation; float64 and loops."""
    total, number = 0.0, 0
    tokens, segments, learned = (np.asarray(a) for a in (batch.tokens, batch.segment_ids, batch.learned))
    for b, t in np.ndindex(*tokens.shape):
        if t + n < tokens.shape[1] and segments[b, t] == segments[b, t + n] > 0 and learned[b, t + n]:
            logits = hidden[b, t] @ head
            total += np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[tokens[b, t + n]]
            number += 1
    return total, number


def test_the_loss_is_the_mean_over_learned_tokens_of_mtp_too():
    (_, loss, mtp), hidden, head = losses(masked)
    with jax.set_mesh(make_mesh(jax.devices()[:1])):
        batch = masked()
    for k, got in enumerate((loss, mtp)):
        total, number = by_hand(batch, hidden[k], head, k + 1)
        assert 10 < number < 40
        assert got == pytest.approx(total / number, rel=1e-5)


def test_a_packed_row_has_the_losses_of_its_conversations_alone():
    """Neither attention nor a prediction crosses from one to the next; what is not learned is read all the same."""
    lengths = [length for row in ROWS for length in row]

    def apart():
        whole = {name: np.asarray(getattr(masked(), name)) for name in ("tokens", "segment_ids", "learned")}
        alone = {name: np.zeros((16, 16), a.dtype) for name, a in whole.items()}
        places = [(b, s) for b, row in enumerate(ROWS) for s in range(1, len(row) + 1)]
        for i, (b, s) in enumerate(places):
            here = whole["segment_ids"][b] == s
            for name, a in whole.items():
                alone[name][i, : here.sum()] = a[b, here]
        alone["segment_ids"] = np.minimum(alone["segment_ids"], 1)
        positions = np.broadcast_to(np.arange(16, dtype=np.int32), (16, 16))
        return Batch(*(jax.device_put(a, spec("batch", "seq")) for a in
                       (alone["tokens"], alone["segment_ids"], positions, alone["learned"])))  # fmt: skip

    assert len(lengths) <= 16
    (_, loss, mtp), *_ = losses(apart)
    (_, packed, packed_mtp), *_ = losses(masked)
    assert packed == pytest.approx(loss, rel=1e-5)
    assert packed_mtp == pytest.approx(mtp, rel=1e-5)


@pytest.mark.parametrize("n, sizes", [(2, ONE), (2, EIGHT)], ids=["micro-batches", "8 devices"])
def test_the_loss_is_the_same_on(n, sizes):
    """Means are over all learned tokens of the step, however many each part has."""
    batch = functools.partial(masked, ROWS + ROWS[:4] * 2)
    np.testing.assert_allclose(losses(batch, n, sizes)[0], losses(batch)[0], rtol=1e-5)


def test_where_all_is_learned_the_loss_is_that_of_pre_training():
    plain = losses(lambda: models.pack(ROWS))[0]
    every = losses(lambda: masked().replace(learned=jax.device_put(np.ones((8, 16), bool), spec("batch", "seq"))))[0]
    assert plain == every


# Runs.

TEMPLATE = """{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + 'Q' + m.content + 'A' }}
{%- else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"""
PAIRS = [("one", "eins"), ("two", "zwei"), ("six", "sechs"), ("ten", "zehn"), ("red", "rot")]
RATE = {"optimizer.peak_lr": 3e-3, "optimizer.schedule": "constant"}


@pytest.fixture(scope="module", autouse=True)
def compiled_programs(tmp_path_factory):
    with runs.compiled_once(tmp_path_factory):
        yield


@functools.cache
def compiled(config):
    return MAKE(config)


MAKE = loop.jit_train_step


def share(patch):
    """One device, no pictures, and one compilation for all runs that differ only in what the loop does with them."""
    patch.setattr(layout, "devices", lambda: jax.devices()[:1])
    patch.setattr(loop, "jit_train_step", lambda config: compiled(runs.essence(config)))
    for module in (loop, heldout):
        patch.setattr(module, "abstract_state", runs.like)
    patch.setattr(loop.Recorder, "draw", lambda *_, **__: None)


@pytest.fixture
def fast(monkeypatch):
    share(monkeypatch)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run of pre-training, stopped at step 5."""
    folder = tmp_path_factory.mktemp("source") / "micro"
    folder.mkdir()
    config = runs.micro(folder / "texts")
    bytes_tokenizer().save(folder / "tokenizer.json")
    save(replace(config, grpo=GrpoConfig(task="parity:8", group_size=8)), folder / "config.json")
    with jax.set_mesh(make_mesh(jax.devices()[:1])), Checkpoints(folder) as checkpoints:
        checkpoints.save(5, models.state(config), {"steps": [], "load": []})
    return folder


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def talk(*texts):
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Five questions, and a template."""
    folder = tmp_path_factory.mktemp("chats")
    (folder / "chat.jinja").write_text(TEMPLATE)
    return write(folder / "chats.jsonl", [talk(q, a) for q, a in PAIRS])


def tune(source, run, chats, *, changes=None, **options):
    options = {"template": chats.parent / "chat.jinja", "quiet": True, **options}
    return sft(source, run, [str(chats)], changes=RATE | (changes or {}), **options)


class Killed(BaseException):
    """As kill -9, but for this process."""


def killed_at(patch, step: int):
    start, taken = loop.Run._batch, iter(range(1000))

    def batch(self, arrays):
        if next(taken) == step:
            raise Killed
        return start(self, arrays)

    patch.setattr(loop.Run, "_batch", batch)


@pytest.fixture(scope="module")
def whole(source, chats, tmp_path_factory):
    """Six steps of eight rows: 24 passes over four conversations in two rows."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        share(patch)
        tune(source, folder, chats, epochs=24, changes={"keep_checkpoints": 9})
    return folder


@pytest.fixture
def run(whole, tmp_path, fast):
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def test_a_run_begins_with_weights_alone_and_a_killed_one_goes_on_bit_for_bit(
    run, source, chats, tmp_path, monkeypatch, capsys
):
    config = configuration.load(run / "config.json")
    assert (config.name, config.data.learn, config.steps) == ("micro-sft", "assistant", 6)
    assert config.grpo is None  # of what it began with
    assert origin(run) == Origin(str(source), 5, weights_alone=True)
    first, came = runs.state(run, config, 0), runs.state(source, runs.micro(source), 5)
    for name, value in first.items():
        if name.startswith(("model", "router_bias")):
            np.testing.assert_array_equal(value, came[name], err_msg=name)
        elif name.startswith("opt_state"):
            assert not value.any(), name
    rows = [row for row in runs.rows(run) if row["kind"] == "eval"]
    assert [row["step"] for row in rows] == [*range(7)]  # before it begins, and ten times, if it has as many steps
    trained = [row["loss"] for row in runs.rows(run) if row["kind"] == "train"]
    assert trained[-1] < trained[0] - 0.3 and "heldout_bpb" not in rows[0] and "gzip_bpb" not in rows[0]
    killed = tmp_path / "killed"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, 4)
        tune(source, killed, chats, epochs=24, changes={"keep_checkpoints": 9})
    tune(source, killed, chats)
    runs.assert_same_run(run, killed, config)
    said = capsys.readouterr().err
    assert "training   4 conversations, " in said and "of them to learn" in said and "nats a learned token" in said
    assert f'dsjax generate {killed} --chat --prompt "Hello"' in said


def test_a_run_keeps_to_its_conversations(run, whole, source, chats, tmp_path):
    other = write(tmp_path / "other.jsonl", [talk("a", "b"), talk("c", "d")])
    with pytest.raises(ConfigError, match=rf"^--data={other}: not the conversations that the run in {run} began with"):
        sft(source, run, [str(other)], quiet=True)
    with pytest.raises(ConfigError, match=r"^data.learn=last_turn: the run in .* has assistant and cannot change it"):
        tune(source, run, chats, last_turn=True)
    kept = configuration.load(run / "config.json")
    save(replace(kept, data=replace(kept.data, learn="last_turn")), run / "config.json")
    corpus = json.loads((run / "data" / "facts.json").read_text())
    corpus["facts"]["sha256"] = fingerprint_of(configuration.load(run / "config.json"), run)
    (run / "data" / "facts.json").write_text(json.dumps(corpus))
    with pytest.raises(ConfigError, match=f"^--last-turn: missing; the run in {run} began with it"):
        tune(source, run, chats)
    shutil.copy(whole / "data" / "facts.json", run / "data" / "facts.json")
    save(kept, run / "config.json")
    (tmp_path / "t.jinja").write_text("x")
    with pytest.raises(ConfigError, match=r"^--template=.*t.jinja: not the one that the run in"):
        tune(source, run, chats, template=tmp_path / "t.jinja")
    with pytest.raises(ConfigError, match=f"^{source}: holds a run of `dsjax train`; choose another --run"):
        tune(source, source, chats)
    loop.train(replace(configuration.load(run / "config.json"), steps=7), run, explicit={"steps": 7}, quiet=True)
    assert runs.rows(run)[-1]["step"] == 7  # the .jsonl file is not asked for
    tune(source, run, chats, epochs=32, changes={"data.on_error": "skip"})
    assert runs.rows(run)[-1]["step"] == 8
    tune(source, run, chats)  # whose conversations are the same


def test_it_is_measured_shown_and_drawn(run, chats, tmp_path, monkeypatch):
    def dsjax(*args):
        result = CliRunner().invoke(cli, [str(a) for a in args])
        assert result.exit_code == 0, result.output
        return result.stdout

    last = [row for row in runs.rows(run) if row["kind"] == "eval"][-1]
    measured = json.loads(dsjax("eval", run, "--json"))
    assert measured["heldout_nats"] == pytest.approx(last["heldout_nats"], rel=1e-5)
    assert measured["heldout_documents"] == 1 and measured["heldout_learned"] < measured["heldout_tokens"]
    other = shutil.copyfile(chats, tmp_path / "other.jsonl")
    assert json.loads(dsjax("eval", run, "--json", f"--data.sources={other}"))["heldout_documents"] == 5
    shown = dsjax("data", "inspect", run, "--n=1", "--row=1")
    assert "A[learned:]" in shown and "3 documents" in shown
    assert "nats a learned token" in page.page(run) and "bits a byte" not in page.page(run)
    monkeypatch.undo()
    with (tmp_path / "loss.png").open("wb") as file:
        picture.draw([json.loads(line) for line in (run / "metrics.jsonl").open()], file)
    assert (tmp_path / "loss.png").stat().st_size > 10_000


@pytest.mark.slow
def test_generate_chat_answers_as_it_was_taught(source, chats, tmp_path, fast):
    folder = tmp_path / "run"
    tune(source, folder, chats, changes={"steps": 40, "optimizer.peak_lr": 1e-2, "eval_every": 40})
    corpus = load_chats(configuration.load(folder / "config.json").data, 262, folder)
    learned = [corpus.tokenizer.decode(corpus.train[i]) for i in range(4)]
    known = [(question, answer) for question, answer in PAIRS if f"Q{question}A{answer}" in learned]
    assert len(known) == 4
    for question, answer in known[:2]:
        asked = ["generate", str(folder), "--chat", "--prompt", question, "--temperature", "0", "--max-tokens", "12"]
        result = CliRunner().invoke(cli, asked)
        assert (result.exit_code, result.stdout) == (0, answer), result.stderr


@pytest.mark.slow
def test_a_hub_folder_is_tuned_in_a_folder_of_its_own(source, chats, tmp_path, monkeypatch):
    import checkpoints

    monkeypatch.setattr(layout, "devices", lambda: jax.devices()[:1])
    model = replace(checkpoints.KINDS["deepseek_v3"], vocab_size=262)
    hub = checkpoints.write(tmp_path / "hub", checkpoints.draw(model), model)
    bytes_tokenizer().save(hub / "tokenizer.json")
    (hub / "chat_template.jinja").write_text(TEMPLATE)
    changes = {"seq_len": 32, "batch_size": 4}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, 0)
        tune(hub, tmp_path / "run", chats, epochs=40, changes={"seq_len": 24, "batch_size": 4, "seed": 5})
    result = tune(hub, tmp_path / "run", chats, template=None, epochs=4, changes=changes)
    config = configuration.load(tmp_path / "run" / "config.json")
    assert (config.name, config.steps, config.batch_size, result["step"]) == ("hub-sft", 2, 4, 2)
    assert (config.seq_len, config.seed) == (32, 0)  # nothing of what took no step
    tune(hub, tmp_path / "run", chats, template=None, changes={"steps": 3})
    assert runs.rows(tmp_path / "run")[-1]["step"] == 3
    with pytest.raises(ConfigError, match=rf"other: the run in {tmp_path}/run began with {hub}; choose another --run"):
        tune(shutil.copytree(hub, tmp_path / "other"), tmp_path / "run", chats, template=None)
    with pytest.raises(ConfigError, match=rf"^{source}: the run in {tmp_path}/run began with {hub}; choose another"):
        tune(source, tmp_path / "run", chats, template=None)


def test_an_import_is_of_one_folder_and_begins_afresh_until_a_step_is_taken(tmp_path):
    import checkpoints

    hub = checkpoints.write(tmp_path / "hub", checkpoints.draw(model := checkpoints.KINDS["deepseek_v3"]), model)
    bytes_tokenizer().save(hub / "tokenizer.json")
    run = tmp_path / "run"
    import_hub(hub, run, Config(), True)
    fresh = configuration.load(run / "config.json")
    save(replace(fresh, seq_len=16, seed=9), run / "config.json")
    import_hub(hub, run, Config(), True)
    assert configuration.load(run / "config.json") == fresh
    other = Path(shutil.copytree(hub, tmp_path / "other"))
    with pytest.raises(ConfigError, match=f"^{other}: the run in {run} began with {hub}; choose another --run"):
        import_hub(other, run, Config(), True)


# Settings.


def test_the_recipes_are_the_published_ones():
    """Reference sections 7.4 and 7.6: epochs, first and last learning rate, and what else was published."""
    base = runs.micro("texts", seq_len=64)
    base = replace(base, model=replace(base.model, max_position_embeddings=65536))
    for name, epochs, first, last, batch_size, seq_len in (
        ("v3", 2, 5e-6, 1e-6, 8, 64),
        ("v2", 2, 5e-6, 5e-6, 8, 64),
        ("r1", 2, 5e-5, 5e-6, 128, 32_768),
        ("moe_16b", 8, 1e-5, 1e-5, 1024, 4096),
        ("distill_qwen_1_5b", 2, 1e-4, 1e-5, 64, 32_768),
        ("distill_llama_70b", 2, 2e-5, 2e-6, 64, 32_768),
    ):
        config = configuration.override(base, settings(base, RECIPES[name]) | {"steps": 1000})
        schedule = Schedule(config)
        assert RECIPES[name].epochs == epochs
        assert schedule.at(0).learning_rate == pytest.approx(first)
        assert schedule.at(999).learning_rate == pytest.approx(last, rel=1e-3)
        assert (config.batch_size, config.seq_len) == (batch_size, seq_len)
        assert schedule.at(0).mtp_weight == schedule.at(999).mtp_weight == base.mtp.loss_weight_final
        assert config.data.packing == "best_fit" and config.data.document_mask


def test_steps_are_the_rows_of_the_epochs(run):
    config = configuration.load(run / "config.json")
    corpus = load_chats(config.data, 262, run)
    n = TrainRows(corpus, config.data, 32, config.seed).rows_in(1)
    assert n == 2
    for epochs, steps in ((4, 1), (5, 2), (6.5, 2), (100, 25)):
        assert planned(config, corpus, epochs, {}).steps == steps
    assert planned(config, corpus, 400, {}).eval_every == 10
    given = planned(replace(config, log_every=7), corpus, 1, {"steps": 6, "log_every": 7})
    assert (given.steps, given.log_every, given.eval_every, given.checkpoint_every) == (6, 7, 1, 1)
    with pytest.raises(
        ConfigError, match=r"^batch_size=8: 3 epochs of these conversations are 6 rows of 32 tokens; exp"
    ):
        planned(config, corpus, 3, {})


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--data: missing; expected one or more .jsonl files of conversations"),
        (["--data=none.jsonl"], "data.sources=none.jsonl: no such file or folder"),
        (["--data=CHATS", "--recipe=r2"], "--recipe=r2: no such recipe; the nearest is r1"),
        (["--data=CHATS", "--epochs=0"], "--epochs=0: expected a number greater than 0"),
        (["--data=CHATS", "--data.sources=x"], "--data.sources=x: expected --data or that, not both"),
        (["--data=CHATS", "--recipe=r1"], "seq_len=32768: expected at most model.max_position_embeddings=96"),
        (["--data=CHATS"], "CHATS: line 1: messages, and the model's folder has no chat template; expected --template"),
        (["--data=CHATS", "--template=none.jinja"], "--template=none.jinja: No such file or directory"),
        (
            ["--data=CHATS", "--seq-len=8", "--template=TEMPLATE"],
            "data.sources=CHATS: no conversations in them (5 long",
        ),
        (["--data=CHATS", "--template=TEMPLATE"], "batch_size=8: 2 epochs of these conversations are 4 rows of 32 tok"),
        (
            ["--data=CHATS", "--data=CHATS:2", "--tempelate=x"],
            "--tempelate=x: no such option; the nearest is --template",
        ),
    ],
)
def test_what_is_wrong_is_one_line(arguments, message, source, chats, tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "devices", lambda: jax.devices()[:1])
    places = {"CHATS": str(chats), "TEMPLATE": str(chats.parent / "chat.jinja")}
    for name, place in places.items():
        arguments, message = [a.replace(name, place) for a in arguments], message.replace(name, place)
    result = CliRunner().invoke(cli, ["sft", str(source), "--run", str(tmp_path / "run"), "--quiet", *arguments])
    assert result.exit_code == 2
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith(f"dsjax: {message}")
