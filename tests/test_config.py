"""Configurations: what is refused and in which words, overrides, JSON."""

import dataclasses
import json
import os
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import configs
from dsjax.config import (
    ComputeConfig,
    Config,
    ConfigError,
    ModelConfig,
    expected,
    field_names,
    field_rows,
    from_dict,
    load,
    nearest,
    override,
    replace,
    save,
    show,
    to_dict,
)

TINY = configs.load("tiny")
V3 = configs.load("v3")


@pytest.mark.parametrize("config", [TINY, V3], ids=lambda config: config.name)
def test_every_field_has_a_description(config):
    for name, _, description in field_rows(config):
        assert description, name
        assert name in field_names()


def test_overrides_parse_by_type():
    config = override(
        V3,
        {
            "optimizer.peak-lr": "1e-3",
            "steps": "1e3",
            "compute.scan_layers": "false",
            "model.rope_scaling": "none",
            "optimizer.step_at": "0.5,0.75",
            "data.sources": "a.txt,b/:0.5",
            "model.q_lora_rank": "None",
            "mesh.fsdp": "-1",
        },
    )
    assert config.optimizer.peak_lr == 1e-3
    assert config.steps == 1000
    assert config.compute.scan_layers is False
    assert config.model.rope_scaling is None
    assert config.optimizer.step_at == (0.5, 0.75)
    assert config.data.sources == ("a.txt", "b/:0.5")
    assert config.model.q_lora_rank is None
    assert config.mesh.fsdp == -1


def test_an_override_of_an_absent_section_makes_it():
    scaling = override(TINY, {"model.rope-scaling.factor": "4"}).model.rope_scaling
    assert scaling.factor == 4
    assert override(TINY, {"model.rope_scaling": scaling}).model.rope_scaling == scaling


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("stepz", "5", "stepz: no such field; the nearest is steps"),
        ("optimizer.peek-lr", "1", "optimizer.peek_lr: no such field; the nearest is optimizer.peak_lr"),
        ("peak_lr", "1", "peak_lr: no such field; the nearest is optimizer.peak_lr"),
        ("expert", "1", "expert: no such field; the nearest is balance.expert or mesh.expert"),
        ("steps.x", "1", "steps.x: no such field; the nearest is steps"),
        ("steps", "x", "steps=x: expected a whole number greater than 0"),
        ("steps", "0", "steps=0: expected a whole number greater than 0"),
        ("steps", "1.5", "steps=1.5: expected a whole number greater than 0"),
        ("steps", "a\nb", r"steps='a\nb': expected a whole number greater than 0"),
        ("steps", "", "steps='': expected a whole number greater than 0"),
        pytest.param("steps", 10**5000, "steps=2**16609 or more: expected a number below 2**63", id="enormous"),
        ("steps", True, "steps=true: expected a whole number greater than 0"),
        ("optimizer.b2", "1", "optimizer.b2=1: expected a number at least 0 and less than 1"),
        ("optimizer.peak_lr", "nan", "optimizer.peak_lr=nan: expected a number greater than 0"),
        ("optimizer.ema_decay", "2", "optimizer.ema_decay=2: expected a number at least 0 and less than 1, or none"),
        ("optimizer.step_at", "0.5,a", "optimizer.step_at=a: expected numbers, separated by commas"),
        (
            "optimizer.step_at",
            "0.5,2",
            "optimizer.step_at=0.5,2.0: expected tokens, or parts of the run's up to 1, not both",
        ),
        ("data.sources", "", "data.sources='': expected one text or more, separated by commas"),
        ("compute.remat", "ful", "compute.remat=ful: expected one of none, full, deepseek"),
        ("compute.scan_layers", "maybe", "compute.scan_layers=maybe: expected true or false"),
        ("model", "3", "model=3: expected its fields one by one, such as model.vocab_size"),
        ("model.n_group", "3", "model.n_group=3: expected a divisor of model.n_routed_experts=16"),
        ("mesh.data", "0", "mesh.data=0: expected a positive number, or -1 for what is left"),
        ("data.tokenizer", 3, "data.tokenizer=3: expected a text"),
    ],
)
def test_a_refusal_names_field_value_and_what_would_work(name, value, message):
    with pytest.raises(ConfigError) as error:
        override(TINY, {name: value})
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "a configuration: expected a dictionary of fields, got a list"),
        (None, "a configuration: expected a dictionary of fields, got a NoneType"),
        ({1: 2}, "1: no such field; names are texts"),
        ({"model": []}, "model=''.*: expected its fields one by one"),
        ({"model": {"hiden_size": 3}}, "model.hiden_size: no such field; the nearest is model.hidden_size"),
        ({"steps": "x" * 1000}, r"steps=x+\.\.\. \(1000 characters\): expected a whole number"),
    ],
)
def test_from_dict_refuses(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(values)


def test_construction_and_replace_raise_config_errors_too():
    with pytest.raises(ConfigError, match=r"^vocab_size=0: expected a whole number greater than 0$"):
        ModelConfig(vocab_size=0)
    with pytest.raises(ConfigError, match=r"^steps=-1: expected a whole number greater than 0$"):
        replace(TINY, steps=-1)
    with pytest.raises(ConfigError, match=r"^stepz: no such field; the nearest is steps$"):
        replace(TINY, stepz=1)
    with pytest.raises(ConfigError, match=r"nearest is model.hidden_size|nearest is hidden_size"):
        ModelConfig(hiden_size=3)


def test_configurations_are_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.steps = 3
    assert hash(TINY) == hash(configs.load("tiny"))


WORDS = st.sampled_from(
    [*field_names(), "model", "optimizer", "model.rope_scaling", "mesh", "", ".", "model.", "x.y.z"]
)
VALUES = st.recursive(
    st.sampled_from([None, True, False])
    | st.one_of(st.integers(), st.builds(lambda: 10**5000), st.floats(), st.text(max_size=20), st.binary()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def _one_clear_line(error: ConfigError):
    assert str(error).isprintable()
    assert len(str(error)) < 1000


@settings(deadline=None)
@given(st.dictionaries(WORDS | st.text(max_size=30), VALUES, max_size=4))
def test_override_raises_nothing_but_config_errors(changes):
    try:
        assert isinstance(override(TINY, changes), Config)
    except ConfigError as error:
        _one_clear_line(error)


@settings(deadline=None)
@given(VALUES | st.dictionaries(st.sampled_from([f.name for f in dataclasses.fields(Config)]), VALUES))
def test_from_dict_raises_nothing_but_config_errors(values):
    try:
        config = from_dict(values)
    except ConfigError as error:
        _one_clear_line(error)
    else:
        assert from_dict(to_dict(config)) == config


@settings(deadline=None)
@given(st.binary(max_size=60) | st.text('{}[]":, \n0stepmodl', max_size=40).map(str.encode))
def test_load_raises_nothing_but_config_errors(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("load") / "config.json"
    path.write_bytes(text)
    try:
        load(path)
    except ConfigError as error:
        _one_clear_line(error)
        assert str(error).startswith(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n "steps": 3,,\n}', "{}, line 2: not JSON: Expecting property name enclosed in double quotes (column 13)"),
        ('{\n "model": {\n  "hiden_size": 4\n }\n}', "{}, line 3: model.hiden_size: no such field"),
        ('{"steps": 1, "steps": 2}', "{}: not a configuration: steps is there twice"),
        ('{\n\n"steps": 0}', "{}, line 3: steps=0: expected a whole number greater than 0"),
        ("[" * 100_000, "{}: not a configuration: "),
        ("[]", "{}: a configuration: expected a dictionary of fields, got a list"),
    ],
)
def test_load_names_the_file_and_the_line(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"^" + re.escape(message.format(path))):
        load(path)


@pytest.mark.parametrize(("dtype", "precision"), [("bfloat16", "bf16"), ("float32", "float32")])
def test_a_run_that_has_a_dtype_is_read(tmp_path, dtype, precision):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"steps": 3, "compute": {"dtype": dtype, "remat": "full"}}))
    assert load(path) == Config(steps=3, compute=ComputeConfig(precision=precision, remat="full"))


def test_load_of_what_is_no_file(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="directory"):
        load(tmp_path)


def test_save_replaces_the_file_or_leaves_it(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    save(TINY, path)
    assert path.stat().st_mode & 0o444 == 0o444 & ~_umask()

    def fail(*_):
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="power cut"):
        save(V3, path)
    assert load(path) == TINY
    assert os.listdir(tmp_path) == ["config.json"]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_words():
    assert expected("optimizer.ema_decay") == "a number at least 0 and less than 1, or none"
    assert expected("model.rope-scaling").endswith("such as model.rope-scaling.factor, or none")
    assert nearest("peak-lr", ["steps", "optimizer.peak-lr"]) == ["optimizer.peak-lr"]
    shown = {None: "none", True: "true", 1.5: "1.5", "a b": "a b", " ": "' '", (1, "x"): "1,x"}
    assert [show(value) for value in shown] == list(shown.values())


def test_a_launch_is_not_kept_with_the_run(tmp_path):
    config = override(Config(), {"distributed.coordinator_address": "host:1234", "distributed.num_processes": "2"})
    save(config, tmp_path / "config.json")
    assert "distributed" not in json.loads((tmp_path / "config.json").read_text())
    assert load(tmp_path / "config.json") == Config()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coordinator_address": "host"}, "distributed.coordinator_address=host: expected HOST:PORT"),
        ({"num_processes": "2", "process_id": "2"}, "distributed.process_id=2: expected a number below "),
        ({"num_processes": "0"}, "distributed.num_processes=0: expected a whole number greater than 0, or none"),
        ({"devices": "x"}, "distributed.devices=x: expected a whole number greater than 0, or none"),
    ],
)
def test_a_launch_that_cannot_be_is_named(changes, message):
    with pytest.raises(ConfigError) as error:
        override(Config(), {f"distributed.{name}": value for name, value in changes.items()})
    assert str(error.value).startswith(message)
