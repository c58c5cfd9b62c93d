"""Steering, measured: every method on every concept, at every delta, on two sets of prompts.

A delta is chosen on the first set by every other word of a concept; the numbers are those of
the second set and of the words that were held out.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from apps.topk.checkpoint import DTYPES, Checkpoint
from apps.topk.corpus import progress
from apps.topk.generation import Generator
from apps.topk.neurons.analysis import INPUTS_NAME
from apps.topk.neurons.corpus import token_pieces
from apps.topk.neurons.folder import MODEL, RECORDING, TWIN
from apps.topk.sampling import Sampling
from apps.topk.steering import methods
from apps.topk.steering.handles import Handle, Handles, distinct_features, read_handles, scored
from apps.topk.steering.measuring import Numbers, Written, compared, written
from apps.topk.steering.methods import Concept, Method
from apps.topk.steering.probes import probes_of, prompts_of_rows
from apps.topk.steering.settings import Settings
from lingua_topk.analysis.recording import open_recording
from lingua_topk.analysis.words import words_of
from lingua_topk.errors import CheckpointError, ConfigError, DataError
from lingua_topk.steering import Intervention, steer

CHOOSING, REPORTING, ALL_WORDS = "choosing", "reporting", "all_words"
# Generated tokens of unsteered text, times those of steered: the rate of rare words needs many.
UNSTEERED_DRAWS = 4
DIRECTION_TOKENS = 100_000  # of the recorded text that directions are made of, at most
EXAMPLES = 2  # a concept and method


@dataclass(frozen=True)
class Row:
    """One method on one concept at one delta.

    Attributes:
        chosen: whether the delta is the one that was chosen.
        choosing: on the prompts and the words to choose by.
        reported: on the other prompts, by the words that were held out.
        all_words: on those prompts, by all words of the concept.
    """

    method: Method
    concept: Concept
    delta: float
    chosen: bool
    choosing: Numbers
    reported: Numbers
    all_words: Numbers


@dataclass(frozen=True)
class Example:
    """A prompt with what was written after it; texts."""

    row: Row
    prompt: str
    unsteered: str
    steered: str


@dataclass
class _Side:
    """One of the two models, with what its texts are compared with."""

    model: nn.Module
    dense: bool
    unsteered: dict[str, Written]


class Experiment:
    """The measurement of one checkpoint. `run` makes `rows` and `examples`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        twin: Checkpoint | None,
        analysis: Path,
        named: Sequence[str],
        prompts: Sequence[str],
        settings: Settings,
        *,
        device: Any,
        dtype: str,
        batch_tokens: int,
        journal: Path,
    ):
        """named: neurons in place of those that are chosen here. prompts: texts in place of
        beginnings of the recorded text. journal: a file with what is measured already."""
        self.checkpoint, self.twin_checkpoint = checkpoint, twin
        self.analysis, self.settings = analysis, settings
        self.batch_tokens, self.journal_path = batch_tokens, journal
        self.handles = read_handles(analysis)
        self.tokenizer = checkpoint.tokenizer()
        self.pieces = token_pieces(self.tokenizer, checkpoint.model_args.vocab_size)
        self.model = checkpoint.model(device, DTYPES[dtype])
        self.twin = twin and twin.model(device, DTYPES[dtype])
        self.named = list(dict.fromkeys(named))
        self.rows: list[Row] = []
        self.examples: list[Example] = []
        self.twin_concepts: list[Concept] = []
        self.prompts = self._prompts(prompts)

    @property
    def is_residual(self) -> bool:
        return self.checkpoint.model_args.topk.site == "residual"

    def _prompts(self, given: Sequence[str]) -> dict[str, list[list[int]]]:
        settings = self.settings
        n_choosing = max(settings.prompts // 2, 1)
        if given:
            if len(given) < 3:
                raise ConfigError(
                    f"prompts: {len(given)} are too few: give at least 3, of which a third are to"
                    " choose by"
                )
            add_bos = bool(self.checkpoint.params["data"].get("add_bos", True))
            generator = Generator(self.model, self.tokenizer, add_bos=add_bos)
            ids = [generator.encode(text) for text in given]
            return {CHOOSING: ids[::3], REPORTING: [x for i, x in enumerate(ids) if i % 3]}
        found = prompts_of_rows(
            self._tokens, self.pieces, n_choosing + settings.prompts, settings.prompt_tokens,
            settings.seed,
        )  # fmt: skip
        return {CHOOSING: found[:n_choosing], REPORTING: found[n_choosing:]}

    @cached_property
    def _tokens(self) -> np.ndarray:
        """The recorded text, int32 [N, S]."""
        return np.asarray(open_recording(self.analysis / MODEL / RECORDING).tokens)

    def run(self) -> None:
        """ConfigError, DataError for what is not there; CheckpointError for no finite numbers."""
        self.concepts = self._concepts(self.handles, self.model, dense=False)
        sides = {"": self._side(self.model, dense=False)}
        work = list(self._work_of_the_model())
        if self.twin is not None and self.is_residual:
            sides["twin"] = self._side(self.twin, dense=True)
            work += self._work_of_the_twin()
        together = [
            (sides[side], list(some))
            # By the concept itself: a neuron of the twin can have the name of one of the model's.
            for (side, _), some in groupby(work, key=lambda one: one[:2])
        ]
        with progress.bar("steering", len(together), "concept") as bar:
            for side, some in progress.ticking(together, bar):
                self._measure(side, some[0][1], [method for _, _, method in some])

    # What is steered -----------------------------------------------------------------------

    def _concepts(self, handles: Handles, model: nn.Module, dense: bool) -> list[Concept]:
        """Those that were named, or those of the highest output score by the words to choose by."""
        if self.named and not dense:
            chosen = [handles.named(name) for name in self.named]
            silent = [one.name for one in chosen if not one.maximum > 0 or len(one.words) < 2]
            if silent:
                raise ConfigError(
                    f"neuron={silent[0]!r} fires on fewer than two words of the analysed text, so"
                    " there is nothing to measure: give another"
                )
        else:
            chosen = handles.shortlist(self.settings.candidates)
        halves = {one.name: methods.split_words(one.words) for one in chosen}
        known = [replace(one, words=halves[one.name][0]) for one in chosen]
        with progress.bar("output scores", len(known), "neuron") as bar:
            known = scored(
                known, model, self.tokenizer, probes_of(self.analysis), bar.update, dense
            )
        if not self.named or dense:
            known = distinct_features(known) if self.is_residual else known
            known = known[: self.settings.n]
        if not known:
            raise DataError(
                f"{self.analysis} has no neuron that is told by its words: give --neuron, or"
                " analyse more text"
            )
        return [Concept(one, halves[one.name][1]) for one in known]

    def _work_of_the_model(self) -> Iterator[tuple[str, Concept, Method]]:
        found = self._directions(self.model, dense=False)
        for one in self.concepts:
            yield "", one, methods.of_neuron(methods.NEURON, one.handle)
            other = methods.random_neuron(self.handles, self._whole(one), self.settings.seed)
            yield "", one, methods.of_neuron(methods.RANDOM, other)
            if one.name in found:
                direction = found[one.name]
                yield "", one, methods.of_direction(methods.DIRECTION, one.handle.layer, direction)

    def _work_of_the_twin(self) -> Iterator[tuple[str, Concept, Method]]:
        found = self._directions(self.twin, dense=True)
        for one in self.concepts:
            if one.name in found:
                direction = found[one.name]
                yield (
                    "twin",
                    one,
                    methods.of_direction(methods.TWIN_DIRECTION, one.handle.layer, direction),
                )
        if (self.analysis / TWIN).is_dir():
            layers = {one.index for one in self.handles.layers if one.is_topk}
            read = read_handles(self.analysis, TWIN, dense=True)
            of_twin = replace(read, layers=tuple(x for x in read.layers if x.index in layers))
            self.twin_concepts = self._concepts(of_twin, self.twin, dense=True)
            for one in self.twin_concepts:
                yield "twin", one, methods.of_neuron(methods.TWIN_NEURON, one.handle)

    def _whole(self, one: Concept) -> Handle:
        """With all of its words."""
        return replace(one.handle, words=one.handle.words + one.held_out)

    def _directions(self, model: nn.Module, dense: bool) -> Mapping[str, Any]:
        length = self._tokens.shape[1]
        rows = self._tokens[: max(DIRECTION_TOKENS // length, 1)]
        batch_rows = max(self.batch_tokens // length, 1)
        words = words_of(rows, self.pieces)
        return methods.directions(model, self.concepts, rows, words, batch_rows, dense)

    # Writing and measuring -----------------------------------------------------------------

    def _side(self, model: nn.Module, dense: bool) -> _Side:
        side = _Side(model, dense, {})
        (side.unsteered,) = self._written(side, [], UNSTEERED_DRAWS)
        return side

    def _written(
        self, side: _Side, interventions: Sequence[Intervention], draws: int = 1
    ) -> list[dict[str, Written]]:
        """What the model writes after the prompts of both sets, by set, under each intervention.

        All in one batch: every intervention acts on texts of its own. Without any, the unsteered
        texts, `draws` of each prompt. The draws of a prompt are the same in all.
        """
        prompts = [*self.prompts[CHOOSING], *self.prompts[REPORTING]]
        size, n_copies = len(prompts), max(len(interventions), draws)
        settings = self.settings
        sampling = Sampling(
            settings.max_tokens, settings.temperature, seed=settings.seed, ignore_eos=True
        )
        generator = Generator(side.model, self.tokenizer, self.batch_tokens)
        longest = max(map(len, prompts)) + settings.max_tokens
        parts = torch.arange(n_copies).repeat_interleave(size)  # [texts]
        turned = [
            replace(one, where=(parts == i)[:, None].expand(-1, longest))
            for i, one in enumerate(interventions)
        ]
        seeds = list(range(size)) * n_copies if turned else list(range(size * n_copies))
        with steer(side.model, turned, side.dense):
            found = generator.generate_tokens(prompts * n_copies, sampling, draws=seeds)
        tokens = [one.tokens for one in found]
        groups = [range(i * size, (i + 1) * size) for i in range(n_copies)]
        if not turned:
            groups = [range(len(tokens))]
        return [self._by_set(prompts, [tokens[i] for i in group]) for group in groups]

    def _by_set(self, prompts: list[list[int]], tokens: list[list[int]]) -> dict[str, Written]:
        """Texts that go on from the prompts, once or several times over."""
        judge = self.twin if self.twin is not None else self.model
        n_choosing = len(self.prompts[CHOOSING])
        found = {}
        for name in (CHOOSING, REPORTING):
            mine = [
                i for i in range(len(tokens))
                if (i % len(prompts) < n_choosing) == (name == CHOOSING)
            ]  # fmt: skip
            found[name] = written(
                [prompts[i % len(prompts)] for i in mine], [tokens[i] for i in mine], self.pieces,
                judge, self.batch_tokens,
            )  # fmt: skip
        return found

    def _measure(self, side: _Side, concept: Concept, some: Sequence[Method]) -> None:
        """All deltas on both sets; the one is chosen that is best on the prompts to choose by."""
        found = self._numbers(side, concept, some)
        for method in some:
            own = {delta: found[method.name, delta] for delta in self.settings.deltas}
            # Of equal ones the least.
            best = max(own, key=lambda delta: (own[delta][CHOOSING].score, -delta))
            for delta, numbers in own.items():
                row = Row(
                    method, concept, delta, delta == best, numbers[CHOOSING], numbers[REPORTING],
                    numbers[ALL_WORDS],
                )  # fmt: skip
                self.rows.append(row)
                if row.chosen and method.name in (methods.NEURON, methods.DIRECTION):
                    self._note_examples(side, row)

    def _numbers(
        self, side: _Side, concept: Concept, some: Sequence[Method]
    ) -> dict[tuple[str, float], dict[str, Numbers]]:
        """By method and delta, and by set; of the journal, where they are there."""
        keys = {
            (method.name, concept.name, method.neuron, delta): method.intervention(delta)
            for method in some
            for delta in self.settings.deltas
        }
        todo = {key: one for key, one in keys.items() if key not in self._journal}
        if todo:
            for key, texts in zip(todo, self._steered(side, list(todo.values())), strict=True):
                self._note(key, _compared(concept, texts, side.unsteered))
        return {(key[0], key[3]): self._journal[key] for key in keys}

    def _steered(
        self, side: _Side, interventions: Sequence[Intervention]
    ) -> list[dict[str, Written]]:
        try:
            return self._written(side, interventions)
        except CheckpointError:  # the weights are finite: checked when they were loaded
            raise ConfigError(
                f"deltas={','.join(map(str, self.settings.deltas))}: the steered model gives no"
                " finite numbers: give smaller ones, or --dtype fp32"
            ) from None

    def _note_examples(self, side: _Side, row: Row) -> None:
        (found,) = self._written(side, [row.method.intervention(row.delta)])
        steered = found[REPORTING]
        plain = side.unsteered[REPORTING]
        # Where the words come most often, of the first prompts: what is shown should show it.
        words = {*row.concept.handle.words, *row.concept.held_out}
        counts = [sum(word in words for word in text) for text in steered.words]
        order = sorted(range(len(counts)), key=lambda i: (-counts[i], i))
        for i in order[:EXAMPLES]:
            decode = self.tokenizer.decode
            prompt = decode(steered.prompts[i])
            whole = [
                decode(steered.prompts[i] + text[i]) for text in (plain.tokens, steered.tokens)
            ]
            self.examples.append(Example(row, prompt, *(text[len(prompt) :] for text in whole)))

    # The journal: what was measured before an interruption ----------------------------------

    def inputs(self) -> dict[str, Any]:
        """JSON that is the same only when the results would be."""
        analysis = (self.analysis / INPUTS_NAME).read_bytes()
        return {
            "checkpoint": self.checkpoint.state(),
            "twin": self.twin_checkpoint and self.twin_checkpoint.state(),
            "analysis": hashlib.sha256(analysis).hexdigest(),
            "settings": json.loads(json.dumps(asdict(self.settings))),
            "neurons": self.named,
            "prompts": hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest(),
            "dtype": str(next(self.model.parameters()).dtype),
        }

    @cached_property
    def _journal(self) -> dict[tuple, dict[str, Numbers]]:
        """Of this measurement; another's is begun anew."""
        first = json.dumps(self.inputs())
        found: dict[tuple, dict[str, Numbers]] = {}
        try:
            lines = self.journal_path.read_text(encoding="utf-8").split("\n")
        except (OSError, ValueError):
            lines = []
        if lines[:1] == [first]:
            for line in lines[1:-1]:  # what follows the last newline was cut short
                key, numbers = json.loads(line)
                found[tuple(key)] = {name: Numbers(**one) for name, one in numbers.items()}
        self.journal_path.parent.mkdir(parents=True, exist_ok=True)
        kept = [first, *(_line(key, numbers) for key, numbers in found.items())]
        self.journal_path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        return found

    def _note(self, key: tuple, numbers: dict[str, Numbers]) -> None:
        self._journal[key] = numbers
        with open(self.journal_path, "a", encoding="utf-8") as file:
            file.write(_line(key, numbers) + "\n")


def _compared(
    concept: Concept, steered: Mapping[str, Written], unsteered: Mapping[str, Written]
) -> dict[str, Numbers]:
    """The texts of a set by the words that are looked for in it."""
    own, held_out = set(concept.handle.words), set(concept.held_out)
    asked = {
        CHOOSING: (CHOOSING, own), REPORTING: (REPORTING, held_out),
        ALL_WORDS: (REPORTING, own | held_out),
    }  # fmt: skip
    return {
        name: compared(steered[which], unsteered[which], words)
        for name, (which, words) in asked.items()
    }


def _line(key: tuple, numbers: Mapping[str, Numbers]) -> str:
    return json.dumps([key, {name: one.json() for name, one in numbers.items()}])
