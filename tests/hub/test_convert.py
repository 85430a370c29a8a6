"""Import and export: the same bytes back, nothing dropped in silence, nothing half-written."""

import json

import checkpoints
import jax
import numpy as np
import pytest

from dsjax.config import ConfigError, replace
from dsjax.hub import convert, fp8
from dsjax.hub.checkpoint import HubCheckpoint
from dsjax.hub.convert import export_checkpoint, import_checkpoint
from dsjax.hub.files import HubError, open_folder
from dsjax.hub.load import load, logits
from dsjax.train.checkpoint import Checkpoints
from sharding.mesh import make_mesh

TOKENS = np.random.default_rng(0).integers(0, checkpoints.models.VOCAB, (2, 24))


def contents(folder) -> dict[str, tuple]:
    def whole(stored):
        return stored.dtype, stored.shape, stored.read(*(slice(None) for _ in stored.shape)).tobytes()

    return {name: whole(stored) for name, stored in open_folder(folder).items()}


def there_and_back(folder, tmp_path, **options):
    """(what the user was told, the run folder, the export's tensors)."""
    said = []
    import_checkpoint(
        folder, tmp_path / "run", say=said.append, progress=False, dtype=options.pop("import_dtype", None)
    )
    export_checkpoint(tmp_path / "run", tmp_path / "out", say=said.append, progress=False, **options)
    return said, tmp_path / "run", contents(tmp_path / "out")


@pytest.fixture(scope="module")
def v3(tmp_path_factory):
    """A float32 V3 with MTP, in three files."""
    cfg = checkpoints.KINDS["deepseek_v3"]
    folder = tmp_path_factory.mktemp("hub") / "v3"
    return checkpoints.write(folder, checkpoints.draw(cfg), cfg, shard_bytes=60_000, new_field=3)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """An FP8 V3 whose matrices have edge blocks."""
    folder = tmp_path_factory.mktemp("hub") / "wide"
    return checkpoints.write(
        folder, checkpoints.quantised(checkpoints.draw(checkpoints.WIDE), checkpoints.WIDE), checkpoints.WIDE
    )


@pytest.mark.parametrize("kind", checkpoints.KINDS)
@pytest.mark.parametrize("width", ["float32", "bfloat16"])
def test_import_then_export_gives_the_bytes_back(kind, width, tmp_path):
    cfg = checkpoints.KINDS[kind]
    tensors = checkpoints.draw(cfg)
    tensors = checkpoints.bfloat16(tensors) if width == "bfloat16" else tensors
    folder = checkpoints.write(tmp_path / "hub", tensors, cfg)
    said, _, got = there_and_back(folder, tmp_path)
    assert got == contents(folder)
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads((folder / "config.json").read_text())
    assert [text.split(";")[0] for text in said] == [
        "tokenizer.json: not there",
        "tokenizer.json: the run has none, and the export neither",
    ]


@pytest.mark.parametrize("scale", ["F32", "F8_E8M0"])
@pytest.mark.parametrize("import_dtype", [None, "float32"])
def test_fp8_weights_and_scales_come_back_bit_for_bit(scale, import_dtype, tmp_path):
    cfg, ue8m0 = checkpoints.WIDE, scale == "F8_E8M0"
    tensors = checkpoints.quantised(checkpoints.draw(cfg), cfg, ue8m0=ue8m0, scale_dtype=scale)
    folder = checkpoints.write(tmp_path / "hub", tensors, cfg)
    _, _, got = there_and_back(folder, tmp_path, import_dtype=import_dtype, fp8_blocks=True)
    assert got == contents(folder)


def test_small_pieces_change_nothing(wide, tmp_path, monkeypatch):
    """Every tensor in many pieces, as large models have them."""
    cut = convert.pieces
    monkeypatch.setattr(convert, "pieces", lambda tensor: cut(tensor, most=1))
    assert max(len(convert.pieces(t)) for t in HubCheckpoint(wide).tensors) > 2
    _, _, got = there_and_back(wide, tmp_path, fp8_blocks=True)
    assert got == contents(wide)


def test_without_fp8_the_export_is_dequantised(wide, tmp_path):
    _, _, got = there_and_back(wide, tmp_path)
    assert {dtype for dtype, _, _ in got.values()} == {"BF16", "F32"}
    assert not any(name.endswith(fp8.SUFFIX) for name in got)
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


def test_a_run_that_was_never_fp8_can_become_so(v3, tmp_path):
    _, run, got = there_and_back(v3, tmp_path, fp8_blocks=True)
    quantised = {t.name for t in HubCheckpoint(v3).tensors if t.fp8}
    assert {name for name, (dtype, _, _) in got.items() if dtype == "F8_E4M3"} == quantised
    before, after = logits(load(run, "float32"), TOKENS), logits(load(tmp_path / "out", "float32"), TOKENS)
    # e4m3 keeps four bits, and a route may flip: near in the mean
    assert 0 < np.abs(after - before).mean() < 0.3 * before.std()


@pytest.mark.parametrize("name", ["v3", "wide"])
def test_a_run_computes_what_its_hub_folder_does(name, tmp_path, request):
    folder = request.getfixturevalue(name)
    import_checkpoint(folder, tmp_path / "run", dtype="float32", progress=False, say=str)
    expected = logits(load(folder, "float32"), TOKENS)
    np.testing.assert_allclose(logits(load(tmp_path / "run", "float32"), TOKENS), expected, atol=1e-6)


def test_a_mesh_reads_only_its_slices_and_computes_the_same(wide, monkeypatch):
    expected = logits(load(wide, "float32"), TOKENS)
    read, values = HubCheckpoint.read, []

    def counted(self, tensor, place):
        block = read(self, tensor, place)
        values.append(block.size)
        return block

    monkeypatch.setattr(HubCheckpoint, "read", counted)
    mesh = make_mesh(jax.devices(), data=1, fsdp=2, expert=2, tensor=2)
    loaded = load(wide, "float32", mesh)
    np.testing.assert_allclose(logits(loaded, TOKENS), expected, atol=1e-4)
    total = sum(np.prod(t.shape) for t in HubCheckpoint(wide).tensors if not t.copy)
    assert sum(values) == total  # eight devices, and no number was read twice
    assert max(len(a.sharding.device_set) for a in jax.tree.leaves(loaded.model)) == 8


def test_the_dtype_is_that_of_matrices_and_routers_and_norms_stay_float32(v3):
    loaded = load(v3)
    kinds = {checkpoints.models.weight_name(p): a.dtype for p, a in jax.tree_util.tree_leaves_with_path(loaded.model)}
    assert kinds["moe/ffn/experts/w_up"] == kinds["head"] == "bfloat16"
    assert kinds["moe/ffn/router/weight"] == kinds["norm/scale"] == "float32"


def test_a_model_without_its_mtp_layer_is_one_without_mtp(tmp_path):
    """transformers keeps num_nextn_predict_layers and writes no such layer."""
    cfg = checkpoints.KINDS["deepseek_v3"]
    tensors = {name: a for name, a in checkpoints.draw(cfg).items() if not name.startswith("model.layers.3.")}
    folder = checkpoints.write(tmp_path / "hub", tensors, cfg)
    said, run, got = there_and_back(folder, tmp_path)
    assert "num_nextn_predict_layers=1, and the files hold no layer 3" in said[0]
    assert load(run).config.model.num_nextn_predict_layers == 0 and got == contents(folder)


def test_copies_that_differ_are_kept_and_told(tmp_path):
    cfg = checkpoints.KINDS["deepseek_v3"]
    tensors = checkpoints.draw(cfg)
    own = "model.layers.3.shared_head.head.weight"
    tensors[own] = tensors[own] + 1
    folder = checkpoints.write(tmp_path / "hub", tensors, cfg)
    said, _, got = there_and_back(folder, tmp_path)
    assert any(own in text and "not equal to the shared weights" in text for text in said)
    assert got == contents(folder)
    heard = []
    load(folder, say=heard.append)
    assert any(own in text for text in heard)


def test_copies_may_be_left_out(tmp_path):
    cfg = checkpoints.KINDS["deepseek_v3"]
    whole = checkpoints.draw(cfg)
    tensors = {n: a for n, a in whole.items() if "3.embed_tokens" not in n and "shared_head.head" not in n}
    folder = checkpoints.write(tmp_path / "hub", tensors, cfg)
    _, _, got = there_and_back(folder, tmp_path)
    assert got.keys() == whole.keys()


def test_a_trained_checkpoint_is_exported(tmp_path, one_device):
    """One that Orbax wrote, from its folder too."""
    cfg = checkpoints.KINDS["deepseek_v3"]
    config = checkpoints.models.config(cfg)
    state = checkpoints.models.state(config)
    from dsjax import config as configuration

    configuration.save(config, tmp_path / "config.json")
    with Checkpoints(tmp_path) as saved:
        saved.save(7, state, {})
    export_checkpoint(tmp_path / "checkpoints/7", tmp_path / "out", dtype="float32", progress=False, say=str)
    got = load(tmp_path / "out", "float32")
    for ours, theirs in zip(
        jax.tree.leaves((state.model, state.router_bias)), jax.tree.leaves((got.model, got.router_bias))
    ):
        np.testing.assert_array_equal(ours, theirs)


def change(tensors, cfg, what):
    q = "model.layers.1.mlp.experts.3.up_proj.weight"
    if what == "missing":
        return {n: a for n, a in tensors.items() if n != q}
    if what == "extra":
        return tensors | {"model.layers.0.self_attn.q_proj.bias": np.zeros(4, np.float32)}
    if what == "shape":
        return tensors | {q: tensors[q].T.copy()}
    if what == "integers":
        return tensors | {q: tensors[q].astype(np.int32)}
    if what == "no scale":
        return tensors | {q: tensors[q].astype(fp8.E4M3)}
    if what == "scale alone":
        return tensors | {q + fp8.SUFFIX: np.zeros((1, 1), np.float32)}
    return tensors | {q: tensors[q].astype(fp8.E4M3), q + fp8.SUFFIX: np.zeros((2, 1), np.float32)}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "model.layers.1.mlp.experts.3.up_proj.weight is missing"),
        ("extra", "model.layers.0.self_attn.q_proj.bias is not part of a deepseek_v3 model"),
        ("shape", r"has shape \[32, 16\]; config.json makes it \[16, 32\]"),
        ("integers", "is I32; expected F64, F32"),
        ("no scale", "is F8_E4M3, and .*_scale_inv is missing"),
        ("scale alone", "_scale_inv is there, and .* is F32, not F8_E4M3"),
        ("scale shape", r"_scale_inv is F32\[2, 1\]; expected F32 or F8_E8M0 \[1, 1\]"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_before_any_work(what, message, tmp_path):
    cfg = checkpoints.KINDS["deepseek_v3"]
    folder = checkpoints.write(tmp_path / "hub", change(checkpoints.draw(cfg), cfg, what), cfg)
    for attempt in (lambda: import_checkpoint(folder, tmp_path / "run", say=str), lambda: load(folder)):
        with pytest.raises(HubError, match=message) as error:
            attempt()
        assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


def test_a_failure_leaves_nothing_behind(v3, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    import_checkpoint(v3, tmp_path / "run", say=str, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(HubCheckpoint, "read", fail)
        with pytest.raises(OSError, match="No space"):
            import_checkpoint(v3, tmp_path / "run2", say=str, progress=False)
        patch.setattr(convert._Exporter, "_format", fail)
        with pytest.raises(OSError, match="No space"):
            export_checkpoint(tmp_path / "run", tmp_path / "out", say=str, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_target_with_something_in_it_is_left_alone(v3, tmp_path):
    (tmp_path / "run").mkdir()
    import_checkpoint(v3, tmp_path / "run", say=str, progress=False)  # an empty folder is fine
    before = sorted(tmp_path.rglob("*"))
    for attempt in (
        lambda: import_checkpoint(v3, tmp_path / "run", say=str, progress=False),
        lambda: export_checkpoint(tmp_path / "run", tmp_path / "run", say=str, progress=False),
        lambda: import_checkpoint(v3, v3 / "config.json", say=str, progress=False),
    ):
        with pytest.raises(ConfigError, match="is there already; expected a new folder"):
            attempt()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_is_told_before_any_work(v3, tmp_path, monkeypatch):
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(ConfigError, match="are to be written, and"):
        import_checkpoint(v3, tmp_path / "run", say=str)
    assert not list(tmp_path.iterdir())


def test_exports_of_nothing_are_told(v3, tmp_path):
    with pytest.raises(ConfigError, match="expected a run folder"):
        export_checkpoint(tmp_path, tmp_path / "out", say=str)
    import_checkpoint(v3, tmp_path / "run", say=str, progress=False)
    with pytest.raises(ConfigError, match="expected checkpoint 5"):
        export_checkpoint(tmp_path / "run", tmp_path / "out", step=5, say=str)
    config = convert.configuration.load(tmp_path / "run/config.json")
    other = replace(config, model=replace(config.model, q_lora_rank=None))
    convert.configuration.save(other, tmp_path / "run/config.json")
    with pytest.raises(ConfigError, match=r"leaf .*/wq is missing; this is not config.json's model"):
        export_checkpoint(tmp_path / "run", tmp_path / "out", say=str)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[0, checkpoints.models.VOCAB]], "expected 0 to"),
        ([[-1]], "expected 0 to"),
        ([0, 1], r"expected whole numbers \[B, T\]"),
        ([[0.5]], r"expected whole numbers \[B, T\]"),
        ([[]], r"expected whole numbers \[B, T\]"),
        ([[0] * 5000], "expected at most 4096"),
    ],
)
def test_bad_tokens_are_told(v3, tokens, message):
    with pytest.raises(ConfigError, match=message):
        logits(load(v3, "float32"), tokens)


def test_bad_sources_are_told(tmp_path):
    for source, message in (("nowhere", "no such folder"), (tmp_path, "no config.json")):
        with pytest.raises(ConfigError, match=message):
            load(source)
    with pytest.raises(ConfigError, match="dtype=int8: expected float32, bfloat16 or fp8"):
        load(tmp_path, "int8")
