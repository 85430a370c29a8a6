"""Distillation: the loss to a teacher's likeliest tokens against NumPy, on micro-batches and devices; what the teacher
says on disk; and the command from end to end."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
import runs
from click.testing import CliRunner

from dsjax.cli import cli
from dsjax.config import Config, ConfigError, DataConfig, replace, save
from dsjax.config import load as load_config
from dsjax.data.chats import Chat, keep_chats, load_chats, read_part, teacher_files
from dsjax.data.pipeline import TrainRows, batches
from dsjax.data.tokenizer import bytes_tokenizer
from dsjax.hub.load import Loaded, logits
from dsjax.posttrain import distill as distillation
from dsjax.posttrain import teacher as teaching
from dsjax.posttrain.distill import Traces, distill
from dsjax.posttrain.tasks import open_task
from dsjax.posttrain.teacher import check_tokenizer, put_logits
from dsjax.train import layout
from dsjax.train.checkpoint import Checkpoints
from dsjax.train.layout import on_mesh, share_of
from dsjax.train.loss import Teacher, count, cross_entropy, total_loss
from sharding.mesh import make_mesh
from sharding.rules import constrain, spec

CONFIG = models.config(models.v3(num_hidden_layers=1, first_k_dense_replace=0))
CONFIG = replace(CONFIG, data=replace(CONFIG.data, teacher_weight=0.7))
ROWS = [[7, 6], [16], [3, 4, 5], [10], [16], [8, 8], [2, 3], [9]]
ONE, EIGHT = {"fsdp": 1}, {"data": 2, "context": 2, "tensor": 2}
K = 5


def taught(rows=ROWS):
    """A batch of which a third is learned, with what a teacher says of most places. Under a mesh."""
    batch, rng = models.pack(rows), np.random.default_rng(1)
    shape = batch.tokens.shape
    whole = rng.gamma(0.3, size=(*shape, models.VOCAB))
    whole /= whole.sum(axis=-1, keepdims=True)
    ids = np.argsort(-whole, axis=-1)[..., :K].astype(np.int32)
    probs = np.take_along_axis(whole, ids, axis=-1).astype(np.float32)
    probs *= (rng.random(shape) < 0.8)[..., None]  # of the others nothing is known
    put = functools.partial(jax.device_put, device=spec("batch", "seq", None))
    learned = jax.device_put(rng.random(shape) < 0.3, spec("batch", "seq"))
    return batch.replace(learned=learned, teacher_ids=put(ids), teacher_probs=put(probs))


def by_hand(batch, hidden, head, weight: float) -> float:
    """The mean over learned tokens; float64 and loops."""
    losses, arrays = [], (batch.tokens, batch.segment_ids, batch.learned, batch.teacher_ids, batch.teacher_probs)
    tokens, segments, learned, ids, probs = map(np.asarray, arrays)
    for b, t in np.ndindex(*tokens.shape):
        if t + 1 < tokens.shape[1] and segments[b, t] == segments[b, t + 1] > 0 and learned[b, t + 1]:
            z = hidden[b, t] @ head
            q = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
            hard = -np.log(q[tokens[b, t + 1]])
            p = probs[b, t].astype(np.float64)
            if p.sum() == 0:
                losses.append(hard)
                continue
            soft = -(p * np.log(q[ids[b, t]])).sum() - (1 - p.sum()) * np.log(np.delete(q, ids[b, t]).sum())
            losses.append((1 - weight) * hard + weight * soft)
    return float(np.mean(losses))


@functools.cache
def program(n_devices: int):
    def losses(model, bias, batch, counts):
        total, parts = total_loss(model, batch, bias, counts, jnp.float32(0.3), CONFIG)
        return total, (parts, model(batch, bias, CONFIG.compute).hidden)

    return jax.jit(jax.value_and_grad(losses, has_aux=True)), jax.jit(functools.partial(count, depth=1))


def losses(n=1, sizes=ONE, make=taught):
    """(loss of all micro-batches, gradient of the head, hidden states of the last, head) on a mesh."""
    devices = jax.devices()[: math.prod(sizes.values())]
    with jax.set_mesh(make_mesh(devices, **sizes)):
        model, bias = models.draw(CONFIG.model)
        micro = models.micro_batches(make(), n)
        run, counted = program(len(devices))
        counts = counted(micro)
        parts = [run(model, bias, jax.tree.map(lambda a, i=i: a[i], micro), counts) for i in range(n)]
        loss = sum(float(of[1][0].loss) for of, _ in parts)
        grad = sum(np.asarray(grads.head[...], np.float64) for _, grads in parts)
        hidden, head = (np.asarray(a, np.float64) for a in (parts[-1][0][1][1], model.head[...]))
        return loss, grad, hidden, head


@functools.cache
def alone():
    return losses()


def test_the_loss_is_that_of_the_likeliest_tokens_and_all_others_together():
    loss, _, hidden, head = alone()
    with jax.set_mesh(make_mesh(jax.devices()[:1])):
        batch = taught()
    assert loss == pytest.approx(by_hand(batch, hidden, head, 0.7), rel=1e-5)
    assert loss != pytest.approx(by_hand(batch, hidden, head, 0.0), rel=1e-2)


@pytest.mark.parametrize("n, sizes", [(2, ONE), (2, EIGHT)], ids=["micro-batches", "8 devices"])
def test_loss_and_gradient_are_the_same_on(n, sizes):
    loss, grad, *_ = losses(n, sizes)
    assert loss == pytest.approx(alone()[0], rel=1e-5)
    np.testing.assert_allclose(grad, alone()[1], rtol=1e-3, atol=1e-6)


def mixed(hidden, head, targets, valid, teacher):
    """The loss as it is defined, of which JAX finds the gradient."""
    logq = jax.nn.log_softmax(hidden @ head)
    hard = -jnp.take_along_axis(logq, targets[..., None], -1)[..., 0]
    named = jnp.sum(jax.nn.one_hot(teacher.ids, head.shape[1]), axis=-2)
    rest = jnp.log(jnp.sum(jnp.exp(logq) * (1 - named), axis=-1))
    soft = -jnp.sum(teacher.probs * jnp.take_along_axis(logq, teacher.ids, -1), -1)
    soft -= (1 - jnp.sum(teacher.probs, -1)) * rest
    return jnp.sum(jnp.where(valid, (1 - teacher.share) * hard + teacher.share * soft, 0))


def named_alone(hidden, head, targets, valid, teacher):
    """The same where nothing is left to the others, and all of the loss is to the teacher."""
    probs = teacher.probs / teacher.probs.sum(-1, keepdims=True)
    soft = -jnp.sum(probs * jnp.take_along_axis(jax.nn.log_softmax(hidden @ head), teacher.ids, -1), -1)
    return jnp.sum(jnp.where(valid, soft, 0))


def ours(of, targets, valid, teacher):
    """What is trained with: the loss and its gradient, on a mesh of one device."""

    def loss(of):
        wide, flat = ("batch", "seq", None), ("batch", "seq")
        ids, probs, share = teacher
        said = Teacher(constrain(ids, *wide), constrain(probs, *wide), constrain(share, *flat))
        return cross_entropy(constrain(of[0], *wide), constrain(of[1], "embed", "vocab"), constrain(targets, *flat),
                             constrain(valid, *flat), said)  # fmt: skip

    with jax.set_mesh(make_mesh(jax.devices()[:1])):
        return jax.value_and_grad(loss)(of)


def drawn(top_k, share, seed=0):
    rng = np.random.default_rng(seed)
    hidden, head = rng.normal(size=(2, 6, 8)).astype(np.float32), rng.normal(size=(8, 12)).astype(np.float32)
    probs = np.sort(rng.dirichlet(np.ones(12), size=(2, 6)))[..., ::-1][..., :top_k].astype(np.float32)
    ids = np.argsort(rng.random((2, 6, 12)))[..., :top_k].astype(np.int32)
    teacher = Teacher(ids, probs, np.full((2, 6), share, np.float32))
    given = (hidden, head), (rng.integers(0, 12, (2, 6)).astype(np.int32), rng.random((2, 6)) < 0.8), teacher
    return jax.tree.map(jnp.asarray, given)


@pytest.mark.parametrize("top_k, share", [(1, 1.0), (3, 0.5), (12, 1.0)])
def test_its_gradient_is_that_of_the_definition(top_k, share):
    of, (targets, valid), teacher = drawn(top_k, share)
    got = ours(of, targets, valid, teacher)
    defined = mixed if top_k < 12 else named_alone
    want = jax.value_and_grad(lambda of: defined(*of, targets, valid, teacher))(of)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.slow
def test_less_the_teachers_entropy_it_bounds_the_divergence_from_below_and_meets_it_with_all_tokens():
    (hidden, head), (targets, valid), _ = drawn(1, 1.0)
    mask = np.asarray(valid)
    whole = np.random.default_rng(3).dirichlet(np.ones(12), size=(2, 6))
    q = np.asarray(jax.nn.softmax(hidden @ head), np.float64)
    kl = (whole * np.log(whole / q)).sum(-1)[mask].sum()
    bounds = []
    for k in (1, 3, 6, 12):
        ids = np.argsort(-whole)[..., :k].astype(np.int32)
        p = np.take_along_axis(whole, ids, -1)
        left = np.maximum(1 - p.sum(-1), 1e-300)
        entropy = -(p * np.log(p)).sum(-1) - left * np.log(left)
        teacher = Teacher(*map(jnp.asarray, (ids, p.astype(np.float32), np.ones((2, 6), np.float32))))
        bounds.append(float(ours((hidden, head), targets, valid, teacher)[0]) - entropy[mask].sum())
    assert bounds == sorted(bounds) and bounds[0] < kl - 0.1
    assert bounds[-1] == pytest.approx(kl, abs=1e-4)


# What the teacher says, on disk and in rows.

CFG = models.v3(num_hidden_layers=1, first_k_dense_replace=0, max_position_embeddings=64, vocab_size=264)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    bytes_tokenizer().save(folder / "tokenizer.json")
    with jax.set_mesh(mesh := make_mesh(jax.devices()[:1])):
        model, bias = models.draw(CFG)
    return Loaded(model, bias, mesh, Config(model=CFG, seq_len=64, compute=models.COMPUTE), folder)


@pytest.fixture
def run(tmp_path):
    """A folder with seven conversations in it."""
    rng = np.random.default_rng(0)
    texts = [rng.integers(6, 262, n).astype(np.int32) for n in (9, 5, 12, 30, 7, 5, 8)]
    chats = [Chat(tokens, np.arange(len(tokens)) >= n) for tokens, n in zip(texts, (4, 1, 6, 3, 6, 2, 5))]
    bytes_tokenizer().save(tmp_path / "tokenizer.json")
    parts = [("heldout" if i == 6 else "train", chat, 1.0) for i, chat in enumerate(chats)]
    keep_chats(parts, tmp_path / "data", "of these", {"sha256": "of these"})
    return tmp_path


def settings(top_k=K, **data):
    data = DataConfig(learn="assistant", packing="best_fit", tokenizer="run", teacher_top_k=top_k, **data)
    return Config(model=CFG, seq_len=32, batch_size=4, data=data, compute=models.COMPUTE)


def test_a_row_has_the_teachers_likeliest_next_tokens_at_every_place_that_predicts_a_learned_one(teacher, run):
    put_logits(teacher, settings(), run)
    corpus = load_chats(settings().data, 264, run)
    rows = TrainRows(corpus, settings().data, 32, 0)
    seen = 0
    for number in range(rows.rows_in(1)):
        row = rows[number]
        for segment in range(1, row["segment_ids"].max() + 1):
            here = row["segment_ids"] == segment
            scores = logits(teacher, row["tokens"][here][None])[0].astype(np.float64)
            probs = np.exp(scores - scores.max(-1, keepdims=True))[:, : corpus.tokenizer.vocab_size]
            probs /= probs.sum(-1, keepdims=True)
            ids, said = row["teacher_ids"][here], row["teacher_probs"][here]
            learned = row["learned"][here]
            np.testing.assert_array_equal(said[:-1].sum(-1) > 0, learned[1:])
            for t in np.nonzero(learned[1:])[0]:
                best = np.argsort(-probs[t])[:K]
                np.testing.assert_array_equal(ids[t], best)
                np.testing.assert_allclose(said[t], probs[t][best], rtol=1e-4)
                seen += 1
    assert seen == corpus.facts["train"]["learned"]


def test_a_killed_teacher_goes_on_with_the_conversation_it_was_at(teacher, run, monkeypatch):
    monkeypatch.setattr(teaching, "_ELEMENTS", 64 * 264 * 2)
    put_logits(teacher, settings(), run)
    *paths, facts = teacher_files(run / "data")
    whole = [path.read_bytes() for path in paths]
    for path in (*paths, facts):
        path.unlink()
    asked = []

    def few(loaded, texts, shape, top_k, tell=teaching.likeliest):
        asked.append(len(texts))
        if sum(asked) > 4:
            raise KeyboardInterrupt
        return tell(loaded, texts, shape, top_k)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(teaching, "likeliest", few)
        put_logits(teacher, settings(), run)
    with paths[0].open("ab") as file:
        file.write(b"half a conversation")
    said = []
    put_logits(teacher, settings(), run, say=said.append)
    assert [path.read_bytes() for path in paths] == whole
    assert said == [f"{run / 'data'}: the teacher's probabilities of 4 conversations are there already"]
    monkeypatch.setattr(teaching, "likeliest", None)
    put_logits(teacher, settings(), run)  # nothing is left


def test_the_teachers_logits_are_never_more_than_it_has_room_for(teacher, run, monkeypatch):
    """A long conversation behind short ones goes alone, and in parts where it alone is too much."""
    put_logits(teacher, settings(), run)
    paths = teacher_files(run / "data")
    ids, probs = np.fromfile(paths[0], np.int32), np.fromfile(paths[1], np.float32)
    paths[2].unlink()
    teaching._top.cache_clear()
    monkeypatch.setattr(teaching, "_SHORTEST", 8)
    monkeypatch.setattr(
        teaching, "_ELEMENTS", 264 * 20
    )  # two rows of 8 tokens, or one of 16, or 20 of the longest's 32
    shapes, lengths = [], read_part(run / "data", "train").lengths.tolist()
    counted = type(teacher.model).logits

    def watched(self, hidden):
        shapes.append(hidden.shape[0] * hidden.shape[1])
        return counted(self, hidden)

    monkeypatch.setattr(type(teacher.model), "logits", watched)
    put_logits(teacher, settings(), run)
    assert lengths == [9, 5, 12, 30, 7, 5] and sorted(set(shapes)) == [16, 20]
    np.testing.assert_array_equal(np.fromfile(paths[0], np.int32), ids)
    np.testing.assert_allclose(np.fromfile(paths[1], np.float32), probs, rtol=1e-5)
    teaching._top.cache_clear()


def test_processes_and_devices_get_their_own_part_of_it(teacher, run):
    put_logits(teacher, settings(), run)
    rows = TrainRows(load_chats(settings().data, 264, run), settings().data, 32, 0)
    ((_, arrays),) = batches(rows, lambda step: (0, 4), 0, 1, micro_batch=4, mine=range(4))
    mesh = make_mesh(jax.devices()[:4], data=2, context=2)
    share = share_of(mesh.local_devices, mesh, 4)
    batch = on_mesh({name: a[None] for name, a in arrays.items()}, mesh, share)
    for name, a in arrays.items():
        np.testing.assert_array_equal(np.asarray(getattr(batch, name))[0], a)
    assert batch.teacher_ids.shape == (1, 4, 32, K) and {
        s.data.shape for s in batch.teacher_ids.addressable_shards
    } == {(1, 2, 16, K)}


def test_what_a_student_cannot_learn_from(teacher, run, monkeypatch):
    with pytest.raises(ConfigError, match=r"data.teacher_top_k=5: .* has no teacher's probabilities of that number"):
        load_chats(settings().data, 264, run)
    put_logits(teacher, settings(), run)
    with pytest.raises(ConfigError, match=r"data.teacher_top_k=6: .* `dsjax distill --logits` puts them there"):
        load_chats(settings(6).data, 264, run)
    assert load_chats(settings(0).data, 264, run).train.teacher is None
    short = replace(teacher.config, seq_len=16, model=replace(CFG, max_position_embeddings=16))
    with pytest.raises(ConfigError, match="--logits=6: a conversation has 30 tokens, and the teacher room for 16"):
        put_logits(Loaded(teacher.model, teacher.router_bias, teacher.mesh, short, teacher.folder), settings(6), run)
    other = bytes_tokenizer()
    other.backend.add_tokens(["word"])
    with pytest.raises(ConfigError, match=r"^--logits=3: expected one tokenizer of both models; the teacher's has 26"):
        check_tokenizer(other, bytes_tokenizer(), 3)
    with pytest.raises(ConfigError, match="--logits=300: expected at most 262"):
        check_tokenizer(bytes_tokenizer(), bytes_tokenizer(), 300)


# The stages.


@pytest.fixture
def stages(monkeypatch, tmp_path):
    """Two run folders, and stages that only tell what they were asked."""
    told = []
    for name in ("teacher", "student"):
        (tmp_path / name).mkdir()
        bytes_tokenizer().save(tmp_path / name / "tokenizer.json")
    monkeypatch.setattr(distillation, "newest_step", lambda folder: 7)
    monkeypatch.setattr(distillation, "load", lambda folder, dtype, **options: told.append(("load", folder.name)))

    def write(loaded, task, problems, out, **options):
        told.append(("traces", len(problems), options["samples"]))
        out.parent.mkdir(parents=True, exist_ok=True)
        return {"problems": len(problems), "answers": 40, "kept": 20 if options["keep"] == "right" else 1}

    def tune(source, run, data, **options):
        told.append(("sft", source.name, options["recipe"], options["changes"]))
        (run / "data").mkdir(parents=True, exist_ok=True)
        options["teach"](settings(), run)
        return {"heldout_nats": 1.0}

    monkeypatch.setattr(distillation, "write_traces", write)
    monkeypatch.setattr(distillation, "sft", tune)
    monkeypatch.setattr(distillation, "put_logits", lambda loaded, *_, **__: told.append("logits"))
    return tmp_path, told


def test_a_stage_that_is_done_is_not_done_again(stages):
    folder, told = stages
    places = folder / "teacher", folder / "student"
    with open_task("parity:8") as task:
        once = functools.partial(distill, *places, task, folder / "run", n_problems=9, say=told.append, quiet=True)
        result = once(Traces(samples=2), changes={"steps": 3})
        assert result == {"problems": 9, "answers": 40, "kept": 20, "heldout_nats": 1.0}
        path = folder / "run" / "traces" / "traces.jsonl"
        assert told == [("load", "teacher"), ("traces", 9, 2), f"{path}: 9 problems, 40 answers, 20 kept",
                        ("sft", "student", "distill", {"steps": 3})]  # fmt: skip
        told.clear()
        once(Traces(samples=2), logits=8)
        weights = {"data.teacher_top_k": 8, "data.teacher_weight": 0.5}
        assert told == [("sft", "student", "distill", weights), ("load", "teacher"), "logits"]
        with pytest.raises(ConfigError, match=r"the traces are of samples=2, and now it is 4; choose another --run"):
            once(Traces())
        with pytest.raises(
            ConfigError,
            match=r"1 of 40 answers are worth learning; expected two or more: try more problems or "
            "samples with another --run, or --keep all",
        ):
            distill(*places, task, folder / "other", Traces(keep="all"), say=told.append)


def test_other_problems_or_rewards_need_another_run(stages):
    folder, told = stages
    places, path = (folder / "teacher", folder / "student"), folder / "p.jsonl"
    records = [{"prompt": f"{i}?", "answer": "A", "language": "en"} for i in range(50)]

    def once(records, weights):
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        with open_task(path, weights=weights) as task:
            return distill(*places, task, folder / "run", n_problems=40, say=told.append, quiet=True)

    assert once(records, "choice:1,think:1") == once(records, "choice:1,think:1")
    n = len(told)
    for other in ({"answer": "B"}, {"language": "de"}, {"prompt": "x?"}):
        with pytest.raises(ConfigError, match=r"the traces are of digest=.*, and now it is .*; choose another --run"):
            once([record | other | {"prompt": f"{i}{other.get('prompt', '?')}"} for i, record in enumerate(records)],
                 "choice:1,think:1")  # fmt: skip
    with pytest.raises(ConfigError, match=r"the traces are of rewards=.*, and now it is .*choice.*; choose another"):
        once(records, "choice")
    assert len(told) == n
    kept = json.loads((folder / "run" / "traces" / "traces.json").read_text())
    del kept["asked"]["digest"], kept["asked"]["rewards"]  # of a run before they were kept
    (folder / "run" / "traces" / "traces.json").write_text(json.dumps(kept))
    assert once(records, "choice")


def test_a_student_keeps_to_its_teachers_probabilities(stages):
    folder, told = stages
    student = folder / "run" / "student"
    (student / "checkpoints" / "1" / "rest").mkdir(parents=True)
    save(settings(8), student / "config.json")
    with open_task("parity:8") as task:
        once = functools.partial(distill, folder / "teacher", folder / "student", task, folder / "run", say=told.append)
        with pytest.raises(ConfigError, match=rf"^--logits=0: the student in {student} began with 8; choose another"):
            once()
        assert told == [] and once(logits=8)


def test_problems_of_a_short_file_are_asked_once(stages):
    folder, told = stages
    (folder / "p.jsonl").write_text("".join(json.dumps({"prompt": f"{i}?", "answer": "A"}) + "\n" for i in range(20)))
    with open_task(folder / "p.jsonl", weights="choice") as task:
        distill(folder / "teacher", folder / "student", task, folder / "run", n_problems=90, say=lambda _: None)
    assert told[1] == ("traces", 20 - len(task.heldout()), 4)


def test_another_tokenizer_is_refused_before_anything_is_asked(stages):
    folder, told = stages
    tokenizer = bytes_tokenizer()
    tokenizer.backend.add_tokens(["word"])
    tokenizer.save(folder / "student" / "tokenizer.json")
    with open_task("parity:8") as task, pytest.raises(ConfigError, match="--logits=4: expected one tokenizer of both"):
        distill(folder / "teacher", folder / "student", task, folder / "run", logits=4)
    assert told == []


@pytest.mark.slow
def test_the_command_from_end_to_end(tmp_path, monkeypatch):
    """A teacher that says anything, and a student of another width, which comes nearer to it in a few steps."""
    monkeypatch.setattr(layout, "devices", lambda: jax.devices()[:1])
    texts = runs.write_texts(tmp_path / "texts")
    for name, width in (("teacher", 32), ("student", 16)):
        config = runs.micro(texts, seq_len=64)
        config = replace(config, model=replace(config.model, hidden_size=width))
        (tmp_path / name).mkdir()
        bytes_tokenizer().save(tmp_path / name / "tokenizer.json")
        save(config, tmp_path / name / "config.json")
        with jax.set_mesh(make_mesh(jax.devices()[:1])), Checkpoints(tmp_path / name) as checkpoints:
            checkpoints.save(5, models.state(config), {"steps": [], "load": []})
    asked = ["--prompts", "parity:8", "--problems", "30", "--keep", "all", "--max-tokens", "48", "--max-rows", "32"]
    trained = ["--batch-size=4", "--epochs", "30", "--optimizer.peak-lr=3e-3", "--logits", "16", "--logits-weight", "1"]
    run = tmp_path / "run"
    command = ["distill", str(tmp_path / "teacher"), str(tmp_path / "student"), *asked, *trained, "--run", str(run)]
    for n in range(2):
        result = CliRunner().invoke(cli, [*command, "--quiet"])
        assert result.exit_code == 0, result.output
        trained = [row for row in runs.rows(run / "student") if row["kind"] == "train"]
        n_steps = trained[-1]["step"] if n == 0 else n_steps
        assert trained[-1]["step"] == n_steps and trained[-1]["loss"] < trained[0]["loss"]
    config = load_config(run / "student" / "config.json")
    assert (config.data.teacher_top_k, config.data.teacher_weight, config.name) == (16, 1.0, "micro-sft")
    assert config.optimizer.schedule == "cosine" and config.optimizer.final_lr_ratio == pytest.approx(0.1)
    assert "traces" in {path.name for path in run.iterdir()} and (run / "traces" / "traces.answers.jsonl").is_file()
