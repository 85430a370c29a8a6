"""Training on eight CPU devices, in a process of its own."""

import pytest
import runs

from dsjax.config import replace


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return runs.write_texts(tmp_path_factory.mktemp("corpus") / "texts")


@pytest.mark.slow
def test_experts_on_two_devices_of_eight_train_as_on_one(texts, tmp_path):
    model = replace(runs.micro(texts).model, num_nextn_predict_layers=0)
    path = runs.write_config(runs.micro(texts, model=model, steps=4, log_every=1), tmp_path / "micro.json")
    env = runs.environment(tmp_path / "cache")
    for folder, options in (
        ("one", ()),
        ("eight", ("--devices=8", "--mesh.data=2", "--mesh.fsdp=2", "--mesh.expert=2")),
    ):
        result = runs.dsjax("train", path, "--run", tmp_path / folder, "--quiet", *options, env=env)
        assert result.returncode == 0, result.stderr
    assert "devices    8 cpu devices, mesh data=2 fsdp=2 expert=2" in result.stderr
    one, eight = (runs.rows(tmp_path / folder) for folder in ("one", "eight"))
    for a, b in zip(one, eight, strict=True):
        assert a["kind"] == b["kind"]
        for name in ("loss", "heldout_nats", "grad_norm"):
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=1e-5)
        if a["kind"] == "train":
            assert a["load"] == b["load"]
            assert b["overflow"] == 0


def test_an_impossible_mesh_shows_its_arithmetic(texts, tmp_path):
    path = runs.write_config(runs.micro(texts), tmp_path / "micro.json")
    result = runs.dsjax("train", path, "--mesh.expert=3", env=runs.environment(tmp_path, 8), cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == "dsjax: mesh: expert=3 does not divide the 8 devices; the nearest that does is expert=4\n"
