"""Generated text on a terminal: nothing in it is taken for a command, and it can be stopped."""

import re
import sys
from contextlib import suppress
from dataclasses import replace

from apps.topk.cli import one_line
from apps.topk.generation import Generator
from apps.topk.sampling import MAX_SEED, Sampling
from lingua_topk.errors import ConfigError

PROMPT = "> "

# What moves the cursor, changes colours or titles, or turns the direction of writing; not
# newline and tab.
_COMMANDS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: str) -> str:
    r"""Text for a terminal: control characters as \x1b or \u202e, as what it cannot encode."""
    text = _COMMANDS.sub(lambda found: _escape(found.group()), text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def write(text: str) -> None:
    """Show text at once."""
    sys.stdout.write(shown(text))
    sys.stdout.flush()


def converse(generator: Generator, sampling: Sampling) -> None:
    """Continue each line that is entered, until an empty one or the end of the input.

    Ctrl-C ends a continuation. Lines have draws of their own: the seed is counted up.
    """
    edit_lines()
    print("Enter the beginning of a text; an empty line ends, Ctrl-C stops a continuation.")
    turn = 0
    while (line := read_line()) != "":
        if line is not None:
            seed = (sampling.seed + turn) % (MAX_SEED + 1)
            _continue(generator, line, replace(sampling, seed=seed))
            turn += 1


def _continue(generator: Generator, line: str, sampling: Sampling) -> None:
    try:
        generator.check(generator.encode(line))
        write(line)
        generator.generate([line], sampling, lambda _, piece: write(piece))
        print()
    except KeyboardInterrupt:
        print("\n(stopped)")
    except ConfigError as error:  # a prompt that is too long
        print(one_line(str(error)))


def read_line(echo: bool = False) -> str | None:
    """What was entered, "" at the end of the input, None where there is nothing to do.

    echo: show the line, where it comes from a pipe and nobody has seen it.
    """
    try:
        line = input(PROMPT)
        if echo:
            write(line + "\n")
        return line
    except EOFError:
        print()
        return ""
    except KeyboardInterrupt:
        print()
    except UnicodeDecodeError:
        print("that was not UTF-8")
    return None


def edit_lines() -> None:
    """Arrow keys and a history for `input`, where Python has them."""
    with suppress(ImportError):
        import readline  # noqa: F401
