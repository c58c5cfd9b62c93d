"""How the applications speak to a user: config files, one-line errors, help."""

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lingua_topk._host.lingua import _ending
from lingua_topk._host.lingua._ending import MAKE_ROOM, one_line
from lingua_topk._host.lingua._lock import held
from lingua_topk.errors import ConfigError
from lingua_topk.host import leave_copied_code

__all__ = [
    "MAKE_ROOM",
    "alone",
    "dot_list",
    "help_text",
    "merge",
    "naming",
    "nearest",
    "one_line",
    "read_config",
    "read_yaml",
    "run",
]


def run(main: Callable[[], None]) -> None:
    """Call `main`; a user's mistake becomes one line on stderr and its exit status.

    An exception that carries `exit_status` is meant for the user, ours and the embedded
    host's alike.
    """
    leave_copied_code()
    try:
        _ending.run(main)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # whoever read the output has seen enough, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None


@contextmanager
def alone(folder: Path, field: str, given: Path | None = None) -> Iterator[None]:
    """Within it no other program of ours writes `folder`; ConfigError while one does.

    field: by which the user gave it, or `given`, to which it belongs. A file system without locks
    is said to be one.
    """
    with held(folder, field, given) as note:
        if note:
            print(f"warning: {one_line(note)}", file=sys.stderr)
        yield


@contextmanager
def naming(what: object) -> Iterator[None]:
    """Within it, what a user can mend says where it is: in `what`, a config or a key."""
    try:
        yield
    except Exception as error:
        if getattr(error, "exit_status", None) is None:
            raise
        raise ConfigError(f"{what}: {error}") from None


def read_config(
    args_class: type,
    program: str,
    description: str,
    notes: str = "",
    argv: Sequence[str] | None = None,
) -> Any:
    """An `args_class` from `config=FILE key=value ...`: defaults < file < command line.

    `--help` prints every key with its default and ends the program; no argument at all
    is a ConfigError that says how to get help.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if "--help" in argv or "-h" in argv:
        print(help_text(args_class, program, description, notes))
        raise SystemExit(0)
    if not argv:
        raise ConfigError(
            f"{program} needs config=FILE: see python -m {program} --help for what it takes"
        )
    command_line = dot_list(argv)
    file = command_line.pop("config", None)
    if file is None:
        raise ConfigError(f"config=FILE is missing: see python -m {program} --help")
    return merge(args_class, (read_yaml(str(file)), str(file)), (command_line, "the command line"))


def dot_list(argv: Sequence[str]) -> DictConfig:
    """The config that arguments of the form key=value are. ConfigError for any other form."""
    for argument in argv:
        if "=" not in argument or argument.startswith(("-", "=")):
            raise ConfigError(
                f"argument {argument!r} is not of the form key=value: write for example"
                " config=configs/quickstart.yaml steps=100"
            )
    return _parsed(lambda: OmegaConf.from_dotlist(list(argv)), "the command line")


def merge(args_class: type, *layers: tuple[DictConfig, str]) -> Any:
    """An `args_class` with each layer merged over the ones before; ConfigError names the key.

    Each layer is a config and the name of where it comes from.
    """
    defaults = OmegaConf.structured(args_class())
    config = defaults
    for layer, origin in layers:
        try:
            config = OmegaConf.merge(config, layer)
        except (OmegaConfBaseException, TypeError) as error:  # TypeError: a list for a mapping
            raise ConfigError(_explain(error, config, layer, origin)) from None
    return _parsed(lambda: OmegaConf.to_object(config), "the config")


def read_yaml(path: str) -> DictConfig:
    """A YAML file that holds a mapping, or ConfigError."""
    if not Path(path).is_file():
        raise ConfigError(f"config={path} is not a file: give the path of a YAML file")
    try:
        config = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        reason = one_line(str(error))
        raise ConfigError(f"config={path} is not readable as YAML: {reason}") from None
    if not isinstance(config, DictConfig):
        raise ConfigError(f"config={path} holds no mapping: write one `key: value` a line")
    return config


def _parsed(read: Callable[[], Any], origin: str) -> Any:
    try:
        return read()
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeError) as error:
        raise ConfigError(f"{origin}: {one_line(str(error))}") from None


def _explain(error: Exception, config: DictConfig, layer: DictConfig, origin: str) -> str:
    if not getattr(error, "full_key", None):  # a value for a section, a list for a mapping
        key = _culprit(config, layer)
        return f"{key} (in {origin}) has the wrong form: --help shows if it is a value or a section"
    key = error.full_key
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    known = [str(k) for k in node] if isinstance(node, DictConfig) else []
    if not known and is_dataclass(error.object_type):  # a section that is null so far
        known = [one.name for one in fields(error.object_type)]
    if known and re.sub(r"\[\d+\]$", "", name) not in known:
        elsewhere = _same_name_elsewhere(config, name)
        hint = f"did you mean {elsewhere}?" if elsewhere else nearest(name, known)
        return f"{key} (in {origin}) is no known key: {hint}"
    return f"{key} (in {origin}): {one_line(str(error).splitlines()[0])}"


def _same_name_elsewhere(config: DictConfig, name: str) -> str | None:
    """The one key of that name in another section, as `optim.lr` for `lr`; None for several."""
    keys = [".".join(path) for path, _ in _leaves(OmegaConf.to_container(config))]
    found = [key for key in keys if key.rpartition(".")[2] == name]
    return found[0] if len(found) == 1 else None


def _culprit(config: DictConfig, layer: DictConfig) -> str:
    """The first key of `layer` that cannot be merged over `config` by itself."""
    for key, value in _leaves(OmegaConf.to_container(layer)):
        try:
            OmegaConf.merge(config, OmegaConf.create(_nested(key, value)))
        except (OmegaConfBaseException, TypeError):
            return ".".join(key)
    return "a key"


def _leaves(content: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(content, dict) and content:
        for name, value in content.items():
            yield from _leaves(value, (*path, str(name)))
    else:
        yield path, content


def _nested(path: tuple[str, ...], value: Any) -> Any:
    return {path[0]: _nested(path[1:], value)} if path else value


def nearest(name: str, known: Sequence[str]) -> str:
    """What to write in place of an unknown name."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]}?"
    return f"allowed are {', '.join(sorted(known))}"


def help_text(args_class: type, program: str, description: str, notes: str) -> str:
    """Usage, every key with its default as YAML, and notes."""
    defaults = OmegaConf.to_yaml(OmegaConf.structured(args_class()))
    parts = [
        f"usage: python -m {program} config=FILE [key=value ...]",
        description,
        "Keys and defaults; those of nested sections are written with dots (optim.lr=1e-3):",
        defaults.rstrip(),
        notes,
    ]
    return "\n\n".join(part for part in parts if part)
