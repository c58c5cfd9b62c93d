"""`--name value` flags for a one-shot tool, read off a function's signature.

Fire makes the call. What it would answer with a page of usage is checked before: one line
for an unknown, doubled or missing flag and for a value of the wrong type. Nothing is
guessed from the look of a value: `--name 012` stays the text 012.
"""

import functools
import inspect
import re
import shutil
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import fire
from fire.decorators import SetParseFns

from apps.topk.cli import nearest
from lingua_topk.errors import ConfigError

_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_INDENTED = {"initial_indent": " " * 6, "subsequent_indent": " " * 6}
_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false"}


def call(
    function: Callable[..., Any],
    program: str,
    argv: Sequence[str],
    example: str,
    repeatable: Sequence[str] = (),
    texts: Sequence[str] = (),
) -> Any:
    """`function` with the flags in `argv`; None after `--help`, which prints what it takes.

    `function` has keyword parameters annotated with str, int, float or bool, and a
    docstring that describes each. A flag in `repeatable` may be given several times; its
    values are joined with commas. So may one in `texts`, which becomes a list of its values:
    those may hold any text and are taken as they are. ConfigError for a mistake.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text(function, program, example))
        return None
    argv, listed = split_texts(argv, texts)
    parameters = dict(inspect.signature(function).parameters)
    if not argv and any(one.default is one.empty for one in parameters.values()):
        raise ConfigError(
            f"{program} needs flags, for example {example} (python -m {program} --help lists them)"
        )
    flags = _read_flags(argv, parameters, repeatable)
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in flags:
            raise ConfigError(f"--{name} is missing: see python -m {program} --help")
    results = []

    @SetParseFns(**{name: _parser(parameter) for name, parameter in parameters.items()})
    @functools.wraps(function)
    def collect(**arguments: Any) -> None:  # fire would print a result
        results.append(function(**arguments, **listed))

    fire.Fire(collect, command=[f"--{name}={value}" for name, value in flags.items()])
    return results[0]


def split_texts(
    argv: Sequence[str], names: Sequence[str]
) -> tuple[list[str], dict[str, list[str]]]:
    """The other arguments, and the values of the flags `names`, by name.

    Those may hold any text and may be given several times; their values are taken as they are.
    ConfigError for one without a value.
    """
    rest, texts = [], {}
    todo = list(argv)
    while todo:
        argument = todo.pop(0)
        name, equals, value = argument[2:].partition("=")
        if not argument.startswith("--") or name not in names:
            rest.append(argument)
            # The value of another flag is not looked into.
            if argument.startswith("--") and not equals and todo and not todo[0].startswith("--"):
                rest.append(todo.pop(0))
            continue
        if not equals:
            if not todo or todo[0].startswith("--"):
                raise ConfigError(f"--{name} needs a value: write --{name} TEXT, or --{name}=TEXT")
            value = todo.pop(0)
        texts.setdefault(name, []).append(value)
    return rest, texts


def help_text(function: Callable[..., Any], program: str, example: str) -> str:
    """Usage, what the function's docstring says, and every flag with its default."""
    width = min(shutil.get_terminal_size().columns, 100)
    paragraphs, meanings = _read_docstring(function)
    lines = [f"usage: python -m {program} {example}\n"]
    lines += [textwrap.fill(" ".join(paragraph.split()), width) + "\n" for paragraph in paragraphs]
    for name, parameter in inspect.signature(function).parameters.items():
        required = parameter.default is parameter.empty
        default = "required" if required else f"default: {_shown(parameter.default)}"
        lines.append(f"  --{name} ({default})")
        lines.append(textwrap.fill(" ".join(meanings[name].split()), width, **_INDENTED))
    return "\n".join(lines)


def _read_docstring(function: Callable[..., Any]) -> tuple[list[str], dict[str, str]]:
    """The paragraphs before `Args:` and the meaning of each argument below it."""
    text, _, arguments = inspect.getdoc(function).partition("\nArgs:\n")
    section = re.split(r"\n(?=\S)", arguments)[0]  # ends at the next line without indent
    entries = re.split(r"^ {4}(\w+): ", section, flags=re.MULTILINE)
    return text.strip().split("\n\n"), dict(zip(entries[1::2], entries[2::2], strict=True))


def _shown(default: Any) -> str:
    return str(default).lower() if isinstance(default, bool) else str(default) or "none"


def _read_flags(
    argv: Sequence[str], parameters: dict[str, inspect.Parameter], repeatable: Sequence[str]
) -> dict[str, str]:
    """The flags in `argv` as text by name: `--name value`, `--name=value`, a bare boolean."""
    flags: dict[str, str] = {}
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument[2:].partition("=")
        name = name.replace("-", "_")
        if not argument.startswith("--"):
            raise ConfigError(f"argument {argument!r} belongs to no flag: write --name value")
        if name not in parameters:
            raise ConfigError(f"--{name} is no known flag: {nearest(name, list(parameters))}")
        if not equals:
            has_value = bool(rest) and not rest[0].startswith("--")
            if not has_value and parameters[name].annotation is not bool:
                raise ConfigError(f"--{name} needs a value: write --{name} value")
            value = rest.pop(0) if has_value else "true"
        if name in flags and name not in repeatable:
            raise ConfigError(f"--{name} is given twice: give it once")
        flags[name] = f"{flags[name]},{value}" if name in flags else value
    return flags


def _parser(parameter: inspect.Parameter) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        kind = parameter.annotation
        try:
            return _BOOLEANS[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError):
            raise ConfigError(
                f"--{parameter.name}={text!r} is not {_TYPE_NAMES[kind]}: correct the value"
            ) from None

    return parse
