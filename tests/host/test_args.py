"""lingua.args: dataclasses from YAML and back."""

import logging
from dataclasses import dataclass, field
from typing import Any, Optional

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, ValidationError

from lingua.args import (
    dataclass_from_dict,
    dataclass_to_dict,
    dump_config,
    flatten_dict,
    load_config_file,
    set_struct_recursively,
)
from lingua.errors import ConfigError


@dataclass
class Inner:
    width: int = 3
    rate: float = 0.5


@dataclass
class Outer:
    name: str = "run"
    inner: Inner = field(default_factory=Inner)
    weights: dict[str, float] = field(default_factory=dict)
    extra: Optional[Any] = None  # noqa: UP045


def test_given_values_replace_defaults_and_take_the_annotated_type():
    args = dataclass_from_dict(Outer, {"inner": {"width": "7"}, "weights": {"a": 1}})
    assert args == Outer(inner=Inner(width=7), weights={"a": 1.0})
    assert isinstance(args.inner, Inner)
    assert isinstance(args.weights["a"], float)


def test_an_optional_any_stays_a_plain_container():
    args = dataclass_from_dict(Outer, {"extra": {"tasks": ["a", {"b": 1}]}})
    assert type(args.extra) is dict
    assert type(args.extra["tasks"]) is list
    assert args.extra == {"tasks": ["a", {"b": 1}]}


@pytest.mark.parametrize("value", ["q", None, [1]])
def test_a_value_of_a_wrong_type_names_its_key(value):
    with pytest.raises(ValidationError) as caught:
        dataclass_from_dict(Outer, {"inner": {"width": value}})
    assert caught.value.full_key == "inner.width"


def test_an_unknown_key_is_an_error():
    with pytest.raises(ConfigKeyError, match="nome"):
        dataclass_from_dict(Outer, {"nome": "x"})
    with pytest.raises(ConfigKeyError, match="height"):
        dataclass_from_dict(Outer, {"inner": {"height": 1}})


def test_not_strict_adds_unknown_keys_of_the_top_level_only():
    assert dataclass_from_dict(Outer, {"more": 5}, strict=False).more == 5
    with pytest.raises(ConfigKeyError, match="height"):
        dataclass_from_dict(Outer, {"inner": {"height": 1}}, strict=False)


def test_to_dict_is_the_inverse_of_from_dict():
    args = Outer(inner=Inner(width=9), weights={"a": 2.0}, extra={"k": [1]})
    data = dataclass_to_dict(args)
    assert data == {
        "name": "run",
        "inner": {"width": 9, "rate": 0.5},
        "weights": {"a": 2.0},
        "extra": {"k": [1]},
    }
    assert dataclass_from_dict(Outer, data) == args


def test_to_dict_leaves_a_dict_alone_and_resolves_interpolations():
    data = {"a": object()}
    assert dataclass_to_dict(data) is data
    assert dataclass_to_dict(Outer(name="w${inner.width}"))["name"] == "w3"


def test_flatten_dict():
    nested = {"a": {"b": 1, "c": {"d": [1, {"e": 2}]}}, "f": {}, "g": None}
    assert flatten_dict(nested) == {"a_b": 1, "a_c_d": [1, {"e": 2}], "g": None}
    assert flatten_dict(nested, parent_key="x", sep="/")["x/a/c/d"] == [1, {"e": 2}]


def test_struct_flag_reaches_every_level():
    cfg = OmegaConf.create({"a": {"b": [{"c": 1}]}, "d": "???", "e": "${a.b}", "f": None})
    set_struct_recursively(cfg)
    for node in (cfg, cfg.a, cfg.a.b[0]):
        with pytest.raises(ConfigAttributeError):
            node.unknown = 1
    set_struct_recursively(cfg, strict=False)
    cfg.a.b[0].unknown = 1
    assert cfg.e[0].unknown == 1


def test_a_dumped_config_loads_as_it_was(tmp_path, caplog):
    args = Outer(name="über: all", inner=Inner(rate=1e-6), weights={"a b": 0.25})
    path = tmp_path / "config.yaml"
    path.write_text("old")
    with caplog.at_level(logging.INFO):
        dump_config(args, path)
    assert load_config_file(path, Outer) == args
    assert "über: all" in caplog.text
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


def test_dump_config_is_silent_when_asked_and_takes_a_dict(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        dump_config({"inner": {"width": 4}}, tmp_path / "config.yaml", log_config=False)
    assert caplog.text == ""
    assert load_config_file(tmp_path / "config.yaml", Outer).inner.width == 4


def test_a_dump_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    dump_config(Outer(name="old"), path, log_config=False)

    def fail(handle):
        raise OSError("no space left on device")

    monkeypatch.setattr("lingua._files.os.fsync", fail)
    with pytest.raises(OSError, match="no space"):
        dump_config(Outer(name="new"), path, log_config=False)
    assert load_config_file(path, Outer).name == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


def test_load_config_file_resolves_and_is_strict(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("name: w${inner.width}\ninner: {width: 5}\n")
    assert load_config_file(path, Outer).name == "w5"
    path.write_text("nome: x\n")
    with pytest.raises(ConfigKeyError, match="nome"):
        load_config_file(path, Outer)


def test_load_config_file_says_what_is_wrong_with_the_file(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml is not a file"):
        load_config_file(tmp_path / "none.yaml", Outer)
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="holds no mapping"):
        load_config_file(tmp_path / "list.yaml", Outer)
