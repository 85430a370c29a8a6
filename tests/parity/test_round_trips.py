"""Through a run folder and back: what transformers wrote is read, and what we write it reads, with the same logits."""

import json
import shutil

import kinds
import numpy as np
import pytest
from kinds import KINDS

from dsjax.hub.convert import export_checkpoint, import_checkpoint
from dsjax.hub.load import load, logits

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.23")
pytest.importorskip("safetensors")

import oracle  # noqa: E402


def drawn(kind: str, folder):
    """Their model, its folder, tokens with clear choices."""
    raw = KINDS[kind]
    model = oracle.randomise(oracle.build(raw), raw)
    return model, oracle.save(model, raw, folder), oracle.clear_tokens(model, raw)


def quietly(move, source, target):
    move(source, target, say=lambda note: None, progress=False)
    return target


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_our_export_bit_for_bit(kind, tmp_path):
    model, folder, tokens = drawn(kind, tmp_path / "hf")
    run = quietly(import_checkpoint, folder, tmp_path / "run")
    out = quietly(export_checkpoint, run, tmp_path / "out")
    if kind in ("kimi-k2", "moe-16b"):  # of a model_type that transformers does not know
        again = oracle.read(out)
    else:
        again = transformers.AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
    kept, given = again.state_dict(), model.state_dict()
    assert kept.keys() == given.keys()
    for name, tensor in given.items():
        assert kept[name].dtype == tensor.dtype, name
        assert torch.equal(kept[name], tensor), name
    with torch.no_grad():
        ids = torch.from_numpy(tokens)
        np.testing.assert_array_equal(again(ids).logits.numpy(), model(ids).logits.numpy())


@pytest.mark.parametrize("kind", ["v3", "moonlight"])  # with YaRN and without
def test_both_ways_to_write_rope_are_read(kind, tmp_path):
    model, folder, tokens = drawn(kind, tmp_path / "new")
    written = json.loads((folder / "config.json").read_text())
    rope = written.pop("rope_parameters")
    assert "rope_theta" not in written
    assert "rope_scaling" not in written
    written["rope_theta"], rope_type = rope.pop("rope_theta"), rope.pop("rope_type")
    rope.pop("type", None)
    written["rope_scaling"] = {"type": rope_type, **rope} if rope_type == "yarn" else None
    older = shutil.copytree(folder, tmp_path / "older")
    (older / "config.json").write_text(json.dumps(written))
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits.numpy()
    for source in (folder, older):
        run = quietly(import_checkpoint, source, tmp_path / f"run-{source.name}")
        kinds.check_logits(logits(load(run, dtype="float32"), tokens), expected)
