"""What a report shows, as plain data: who fills it knows the files, the page knows none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Layer:
    """The neurons of one layer.

    Attributes:
        index: of the block.
        is_topk: whether it ends in TopK.
        kept: what the recording kept of it, in words.
        arrays: measures by name, [D] or [D, n], as `apps.topk.analyze` writes them. Those that
            are missing are shown as not measured.
        words: of each neuron its words with their largest value, largest |value| first.
        told: bool [D], whether the words say what a neuron fires on; only such are put forward.
    """

    index: int
    is_topk: bool
    kept: str
    arrays: Mapping[str, np.ndarray]
    words: Sequence[Sequence[tuple[str, float]]]
    told: np.ndarray

    @property
    def width(self) -> int:
        return len(self.arrays["counts"])


@dataclass
class Firings:
    """What fires on a text in one layer: positions, neurons (integers) and values, all [M]."""

    positions: np.ndarray
    neurons: np.ndarray
    values: np.ndarray


@dataclass
class Text:
    """A text with what fires on it.

    Attributes:
        name: how it is listed.
        tokens: ids [S].
        firings: by layer.
        row: of the recording, None for a text that was given.
    """

    name: str
    tokens: np.ndarray
    firings: Mapping[int, Firings]
    row: int | None = None


@dataclass
class Figure:
    title: str
    caption: str
    svg: str


@dataclass
class Table:
    """Cells are shown as they are; numbers are written out by who fills it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass
class Trace:
    """Neurons over the checkpoints of their run, and over layers at its last.

    Attributes:
        steps: of the C checkpoints.
        annealed_at: the step from which on TopK is whole, None where it always was.
        layers: by layer the arrays token_entropy, semantic_entropy, overlap [C, D] (of tokens,
            with the neuron's final self), counts and, where there are, top_tokens [C, D, n];
            settle_step [D], -1 for never.
        pairs: [P, 2], two layers each.
        shared: by name (overlap, correlation) [P, D]: what the neurons of the same index in the
            two layers have in common, and as shifted_overlap and so on, [P, D], those of others.
    """

    steps: Sequence[int]
    annealed_at: int | None
    layers: Mapping[int, Mapping[str, np.ndarray]]
    pairs: np.ndarray
    shared: Mapping[str, np.ndarray]


@dataclass
class SteeredNumbers:
    """What steering did to text, relative to unsteered text; NaN for what was not measured.

    Attributes:
        concept_rate: share of the concept's words in the steered text, 0 to 1.
        unsteered_rate: the same in the unsteered text.
        lift: the first by the second.
        perplexity_ratio: of the texts' perplexities, steered by unsteered.
        score: one number for all, 0 if any part is.
    """

    concept_rate: float
    unsteered_rate: float
    lift: float
    perplexity_ratio: float
    score: float


@dataclass
class SteeredConcept:
    """A neuron that was steered, with what came of it at the delta that was chosen.

    Attributes:
        layer: of the report.
        neuron: its index there.
        words: that it fires on, strongest first; delta was chosen by these.
        held_out_words: those that the numbers are of.
        delta: in multiples of the neuron's maximum; NaN where none was chosen.
        absolute: the same as it is added.
        numbers: None where they were not measured.
    """

    layer: int
    neuron: int
    words: Sequence[str]
    held_out_words: Sequence[str]
    delta: float
    absolute: float
    numbers: SteeredNumbers | None


@dataclass
class SteeredExample:
    """A text with steering and without, from the same prompt.

    Attributes:
        concept: index of the concept.
        method: in words.
        delta: in multiples of the neuron's maximum, or of what the method has in its place.
        absolute: the same as it is added.
        is_chosen: whether this is the delta that was chosen for the concept and method.
        prompt: what both go on from.
        unsteered: text.
        steered: text.
        numbers: of the concept, method and delta, over all prompts; None where not measured.
    """

    concept: int
    method: str
    delta: float
    absolute: float
    is_chosen: bool
    prompt: str
    unsteered: str
    steered: str
    numbers: SteeredNumbers | None


@dataclass
class Steering:
    """What adding to neurons does to text.

    Attributes:
        sentences: the conclusion.
        figure: None where there is none.
        methods: a row a method.
        concepts: the neurons.
        examples: texts of them; of each concept first those of its own neuron.
    """

    sentences: Sequence[str]
    figure: Figure | None
    methods: Table
    concepts: Sequence[SteeredConcept]
    examples: Sequence[SteeredExample]


@dataclass
class Report:
    """Everything on the page.

    Attributes:
        title: of the page.
        facts: name and value, in the order shown.
        layers: with their neurons.
        pieces: the bytes of each token id; b"" for special tokens.
        special: names of special tokens by id.
        rows: token ids [N, S] of the recording, of which the contexts are taken.
        texts: that can be chosen, with what fires on them.
        strongest: how many neurons a token and layer `texts` hold at most.
        n_contexts: of a neuron, at most.
        steering: None where no neuron was steered; the page then has no such part.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    layers: Sequence[Layer]
    pieces: Sequence[bytes]
    rows: np.ndarray
    special: Mapping[int, str] = field(default_factory=dict)
    texts: Sequence[Text] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    sentences: Sequence[str] = ()
    trace: Trace | None = None
    strongest: int = 16
    n_contexts: int = 12
    steering: Steering | None = None
