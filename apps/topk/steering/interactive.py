"""Steering from the terminal: what is entered changes one thing, and the text is written anew."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

from apps.topk import terminal
from apps.topk.cli import one_line
from apps.topk.sampling import Sampling
from apps.topk.steering import choosing, showing
from apps.topk.steering.arguments import check_turning, numbers, one_of
from apps.topk.steering.bench import Bench
from apps.topk.steering.choosing import Choice
from apps.topk.steering.handles import NAME
from apps.topk.steering.turning import ABLATE, ADD, DEFAULTS, MODES, UNITS, Turning, variants
from lingua_topk.errors import ConfigError, UserError
from lingua_topk.steering.interventions import WHERE

HELP = """\
  8          the delta; 4,8,16 for several
  p TEXT     the prompt; TEXT alone does where it does not look like one of these
  3:417      the neuron, as n 3:417; several with commas after n
  c WORD     the neuron that fires on a word and makes it likelier
  s 1        the seed of the draws
  u mean     the unit of the delta: absolute, mean or maximum
  w prompt   where: all, prompt or generated
  m set      the mode: add, set, clamp, scale or ablate
  ?          this help
An empty line or Ctrl-D ends, Ctrl-C stops what is being written."""
INTRODUCTION = """\
Enter a number for another delta (unit: {unit}), the beginning of another text, or ? for all that
can be changed; an empty line ends."""


@dataclass(frozen=True)
class State:
    """What the texts are made from."""

    prompt: str
    sampling: Sampling
    choice: Choice
    how: Turning


class Desk:
    """A conversation in which neurons are turned."""

    def __init__(self, bench: Bench, state: State, num: int):
        """num: texts of the prompt, each with its own draws."""
        self.bench = bench
        self.state = state
        self.num = num
        self.out = showing.console()

    def converse(self) -> None:
        """Take lines until an empty one or the end of the input; mistakes end nothing."""
        terminal.edit_lines()
        echo = not sys.stdin.isatty()
        print(INTRODUCTION.format(unit=self.state.how.unit))
        self._attempt(lambda: self.state, is_first=True)
        while (line := terminal.read_line(echo)) != "":
            if line is not None and line.strip() == "?":
                print(HELP)
            elif line is not None:
                self._attempt(lambda line=line: self.changed(line))

    def _attempt(self, change: Callable[[], State], is_first: bool = False) -> None:
        """Write with what `change` gives; what was before holds on where that is a mistake."""
        new = self.state
        try:
            new = change()
            self._write(new, is_first)
        except KeyboardInterrupt:
            print("\n(stopped)")
        except UserError as error:
            print(terminal.shown(one_line(str(error))))
            return
        self.state = new

    def changed(self, line: str) -> State:
        """The state after a line. ConfigError for one that cannot be."""
        command, _, value = line.strip().partition(" ")
        change = _CHANGES.get(command) if value.strip() else None
        if change is not None:
            return change(self, value.strip())
        if command in _CHANGES and not value.strip():
            raise ConfigError(f"{command} needs a value: ? shows what can be entered")
        if _looks_like_numbers(line):
            return self._with_deltas(line)
        if NAME.fullmatch(line.strip()):
            return self._with_neurons(line)
        return replace(self.state, prompt=line)

    def _with_deltas(self, text: str) -> State:
        how = self.state.how
        if how.mode == ABLATE:
            raise ConfigError(f"delta={text.strip()!r}: mode ablate takes none; enter m add first")
        how = replace(how, deltas=numbers(text))
        check_turning(how)
        return replace(self.state, how=how)

    def _with_prompt(self, text: str) -> State:
        return replace(self.state, prompt=text)

    def _with_neurons(self, names: str) -> State:
        return replace(self.state, choice=choosing.named(self.bench, names))

    def _with_concept(self, word: str) -> State:
        return replace(self.state, choice=choosing.of_word(self.bench, word, 1))

    def _with_seed(self, text: str) -> State:
        if not text.isdecimal():
            raise ConfigError(f"seed={text!r} is not a whole number: give one from 0")
        return replace(self.state, sampling=replace(self.state.sampling, seed=int(text)))

    def _with_unit(self, unit: str) -> State:
        one_of("unit", unit, UNITS)
        return replace(self.state, how=replace(self.state.how, unit=unit))

    def _with_where(self, where: str) -> State:
        one_of("where", where, WHERE)
        return replace(self.state, how=replace(self.state.how, where=where))

    def _with_mode(self, mode: str) -> State:
        one_of("mode", mode, MODES)
        how = self.state.how
        if how.suppress and mode != ADD:
            raise ConfigError(f"mode={mode!r}: started with --suppress, deltas are subtracted")
        return replace(
            self.state, how=replace(how, mode=mode, deltas=how.deltas or DEFAULTS[mode][:1])
        )

    def _write(self, new: State, is_first: bool) -> None:
        turned = variants(new.how, new.choice.neurons)
        self.bench.check(turned)
        if is_first or _is_turned_otherwise(new, self.state):
            showing.show_header(self.out, self.bench, new.choice, new.how, turned)
        prompts = [new.prompt] * self.num
        written = self.bench.write(prompts, new.sampling, turned)
        showing.show_texts(self.out, written, new.choice, new.how.unit, self.num)


_CHANGES: dict[str, Callable[[Desk, str], State]] = {
    "p": Desk._with_prompt, "n": Desk._with_neurons, "c": Desk._with_concept,
    "s": Desk._with_seed, "u": Desk._with_unit, "w": Desk._with_where, "m": Desk._with_mode,
}  # fmt: skip


def _is_turned_otherwise(new: State, before: State) -> bool:
    """Whether more than the numbers is another, so that it is to be said."""
    same = replace(before.how, deltas=new.how.deltas)
    return new.choice != before.choice or new.how != same


def _looks_like_numbers(line: str) -> bool:
    """Whether the line was meant as deltas: its first part is a number, nan and inf included."""
    try:
        float(line.split(",")[0])
    except ValueError:
        return False
    return True
