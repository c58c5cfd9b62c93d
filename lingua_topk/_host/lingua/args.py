"""Dataclasses from YAML and back, by OmegaConf.

Unknown keys and values of a wrong type raise OmegaConf's own exceptions
(`ConfigKeyError`, `ValidationError`): they name the key, and the applications turn them
into one line.
"""

import logging
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, ListConfig, OmegaConf

from ._files import write_whole
from .errors import ConfigError

logger = logging.getLogger(__name__)

T = TypeVar("T")


def set_struct_recursively(cfg: DictConfig | ListConfig, strict: bool = True) -> None:
    """Set OmegaConf's struct flag on `cfg` and on every mapping and list within it."""
    OmegaConf.set_struct(cfg, strict)
    keys = range(len(cfg)) if isinstance(cfg, ListConfig) else list(cfg)
    for key in keys:
        if OmegaConf.is_missing(cfg, key) or OmegaConf.is_interpolation(cfg, key):
            continue
        if OmegaConf.is_config(cfg[key]):
            set_struct_recursively(cfg[key], strict)


def flatten_dict(d: dict[str, Any], parent_key: str = "", sep: str = "_") -> dict[str, Any]:
    """One level: {"a": {"b": 1}} becomes {"a_b": 1}. Lists stay values, empty dicts vanish."""
    flat = {}
    for key, value in d.items():
        name = f"{parent_key}{sep}{key}" if parent_key else key
        if isinstance(value, dict):
            flat.update(flatten_dict(value, name, sep))
        else:
            flat[name] = value
    return flat


def dataclass_from_dict(cls: type[T], data: dict[str, Any], strict: bool = True) -> T:
    """The defaults of `cls` with `data` merged over them; values take the annotated types.

    strict=False lets unknown keys of the top level become attributes of the result; in
    nested dataclasses they are errors all the same.
    """
    defaults = OmegaConf.structured(cls())
    if not strict:
        OmegaConf.set_struct(defaults, False)
    return OmegaConf.to_object(OmegaConf.merge(defaults, OmegaConf.create(data)))


def dataclass_to_dict(dataclass_instance: Any) -> dict[str, Any]:
    """A dataclass object as plain dicts and lists, interpolations resolved; a dict as it is."""
    if isinstance(dataclass_instance, dict):
        return dataclass_instance
    return OmegaConf.to_container(OmegaConf.structured(dataclass_instance), resolve=True)


def load_config_file(config_file: str | Path, dataclass_cls: type[T]) -> T:
    """A `dataclass_cls` from a YAML file. ConfigError where there is no file or no mapping."""
    if not Path(config_file).is_file():
        raise ConfigError(f"config={config_file} is not a file: give the path of a YAML file")
    data = OmegaConf.to_container(OmegaConf.load(config_file), resolve=True)
    if not isinstance(data, dict):
        raise ConfigError(f"config={config_file} holds no mapping: write one `key: value` a line")
    return dataclass_from_dict(dataclass_cls, data)


def dump_config(config: Any, path: str | Path, log_config: bool = True) -> None:
    """Write a config as YAML, whole or not at all; log it at level INFO if asked."""
    node = OmegaConf.create(config) if isinstance(config, dict) else OmegaConf.structured(config)
    text = OmegaConf.to_yaml(node)
    write_whole(Path(path), text)
    if log_config:
        logger.info("the config, as written to %s:\n%s", path, text.rstrip())
