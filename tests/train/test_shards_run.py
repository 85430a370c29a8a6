"""A run that trains straight from shards: it goes on exactly, and ends in one line where a shard is damaged."""

import shutil

import jax
import numpy as np
import pytest
import runs

from dsjax.config import ConfigError, DataConfig, replace
from dsjax.data.build import build
from dsjax.train import layout, loop
from dsjax.train.heldout import evaluate
from dsjax.train.loop import train

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def one_device(tmp_path_factory):
    with runs.compiled_once(tmp_path_factory), pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "devices", lambda: jax.devices()[:1])
        patch.setattr(loop.Recorder, "draw", lambda *_, **__: None)
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    texts = runs.write_texts(folder / "texts")
    for name, source in (("a", texts), ("b", texts / "00*.txt")):
        build([str(source)], str(folder / name), workers=1, progress=False, heldout_fraction=0.1, shard_tokens=2000)
    sources = (str(folder / "a"), f"{folder / 'b'}:2")
    data = DataConfig(sources=sources, packing="best_fit", fim_rate=0.2, cache=str(folder / "cache"))
    return runs.micro(texts, data=data)


class Killed(BaseException): ...


def killed(*_):
    raise Killed


def test_a_run_on_shards_goes_on_as_if_it_had_not_stopped(config, tmp_path, monkeypatch):
    train(config, tmp_path / "whole", quiet=True)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop.Run, "_evaluate", killed)  # after the checkpoint of step 3
        train(config, tmp_path / "parts", quiet=True)
    train(config, tmp_path / "parts", quiet=True)
    runs.assert_same_run(tmp_path / "whole", tmp_path / "parts", config)
    assert not list((tmp_path / "whole" / "data").glob("*.tokens"))  # nothing was copied
    numbers = evaluate(tmp_path / "whole", {"data.sources": config.data.sources[0]})
    assert np.isfinite(numbers["heldout_bpb"]) and numbers["heldout_documents"] > 0


def test_a_damaged_shard_ends_the_run_with_its_name_and_is_left_out_if_asked(config, tmp_path):
    source = tmp_path / "a"
    shutil.copytree(config.data.sources[0], source)
    path = source / "train-000001.array_record"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    config = replace(config, data=replace(config.data, sources=(str(source),)))
    with pytest.raises(ConfigError, match=r"a/train-000001.array_record: sha256 .*--data.on-error=skip"):
        train(config, tmp_path / "run", quiet=True)
    train(replace(config, data=replace(config.data, on_error="skip")), tmp_path / "run", quiet=True)
    assert len([row for row in runs.rows(tmp_path / "run") if row["kind"] == "train"]) == 3
