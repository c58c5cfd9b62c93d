"""A checkpoint whose neurons are turned: its model, its analysis, and the texts it writes."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from apps.topk.checkpoint import DTYPES, Checkpoint
from apps.topk.corpus import progress
from apps.topk.evaluation.scoring import Request, score
from apps.topk.generation import Generation, Generator
from apps.topk.neurons.folder import DONE_NAME, read_analysis
from apps.topk.sampling import Sampling
from apps.topk.steering.handles import Handles, read_handles
from apps.topk.steering.turning import Variant
from lingua_topk.errors import CheckpointError, ConfigError, DataError
from lingua_topk.steering import steer, steerable

FOLDER = "neurons"  # below the dump_dir, where apps.topk.analyze writes


@dataclass(frozen=True)
class Written:
    """What became of all prompts under one variant.

    Attributes:
        variant: None for the unsteered texts.
        texts: in the order of the prompts.
        perplexities: of each text under the twin, NaN for one without tokens; None without a twin.
    """

    variant: Variant | None
    texts: list[Generation]
    perplexities: list[float] | None


class Bench:
    """A model of which neurons are turned.

    Attributes:
        checkpoint: a TopK model's.
        handles: of its analysis; None where there is none.
        widths: how many neurons there are, by layer.
        notes: what a user should know of the analysis, a line each.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        analysis: str,
        twin: Checkpoint | None,
        dtype: str,
        device: torch.device,
        batch_tokens: int,
    ):
        """analysis: its folder, "" for the one in the checkpoint's run, if it is there.

        ConfigError for a model without TopK, DataError for an analysis that does not fit it.
        """
        if checkpoint.model_args.topk is None:
            raise ConfigError(
                f"ckpt={str(checkpoint.folder)!r} is a vanilla model, without TopK, whose neurons"
                " are no handles: give a run with a section model.topk"
            )
        self.checkpoint = checkpoint
        self.batch_tokens = batch_tokens
        self.analysis = analysis_folder(checkpoint, analysis)
        self.handles = None if self.analysis is None else read_handles(self.analysis)
        self.tokenizer = checkpoint.tokenizer()
        self.model = checkpoint.model(device, DTYPES[dtype])
        self.twin = None if twin is None else twin.model(device, DTYPES[dtype])
        self.widths = steerable(self.model)
        self.notes = [] if self.handles is None else list(self._check_analysis(self.handles))
        add_bos = bool(checkpoint.params["data"].get("add_bos", True))
        self.generator = Generator(self.model, self.tokenizer, batch_tokens, add_bos)
        self._unsteered: tuple[Any, list[Generation]] | None = None

    def needed_handles(self, what: str) -> Handles:
        """The analysis; ConfigError that says how to make one where there is none."""
        if self.handles is None:
            raise ConfigError(
                f"{what} needs an analysis of the neurons, and there is none: make one with python"
                f" -m apps.topk.analyze --ckpt {self.checkpoint.folder}, or give --analysis FOLDER"
            )
        return self.handles

    def check(self, variants: Sequence[Variant]) -> None:
        """ConfigError for a layer or neuron that is not there."""
        for one in variants:
            with steer(self.model, one.interventions):
                pass

    def write(
        self, prompts: Sequence[str], sampling: Sampling, variants: Sequence[Variant]
    ) -> list[Written]:
        """The prompts continued without steering, and under every variant, by the same draws."""
        self.check(variants)
        with progress.bar("generating", len(prompts) * (len(variants) + 1), "text") as shown:

            def generate() -> list[Generation]:
                return self.generator.generate(prompts, sampling, on_done=lambda *_: shown.update())

            made = [(None, self._without_steering(prompts, sampling, generate))]
            for one in variants:
                with steer(self.model, one.interventions):
                    made.append((one, _steered(generate, one)))
        return [Written(one, texts, self._perplexities(texts)) for one, texts in made]

    def _without_steering(
        self,
        prompts: Sequence[str],
        sampling: Sampling,
        generate: Callable[[], list[Generation]],
    ) -> list[Generation]:
        """Kept, for the next time that only what steers is another."""
        asked = (tuple(prompts), sampling)
        if self._unsteered is None or self._unsteered[0] != asked:
            self._unsteered = (asked, generate())
        return self._unsteered[1]

    def _perplexities(self, texts: Sequence[Generation]) -> list[float] | None:
        if self.twin is None:
            return None
        found = [math.nan] * len(texts)
        scored = [i for i, one in enumerate(texts) if one.tokens]
        requests = [
            Request(tuple(self.generator.encode(one.prompt)), tuple(one.tokens))
            for one in (texts[i] for i in scored)
        ]
        if requests:
            nats = score(self.twin, requests, self.twin.max_seqlen, self.batch_tokens, "the twin")
            for i, total in zip(scored, nats.log_likelihoods.tolist(), strict=True):
                found[i] = math.exp(min(-total / len(texts[i].tokens), 700))
        return found

    def _check_analysis(self, handles: Handles) -> Iterator[str]:
        """Notes; DataError where the analysis is of another model."""
        for layer in handles.layers:
            width = self.widths.get(layer.index)
            if width is not None and width != len(layer.arrays["counts"]):
                raise DataError(
                    f"{handles.folder}: layer {layer.index} has {len(layer.arrays['counts'])}"
                    f" neurons, and the checkpoint {width}: give --analysis that of this model"
                )
        step = read_analysis(handles.folder).get("step")
        if step != self.checkpoint.step:
            yield (
                f"the analysis is of step {step}, the checkpoint of step {self.checkpoint.step}:"
                " words and strengths may have changed"
            )


def analysis_folder(checkpoint: Checkpoint, given: str) -> Path | None:
    """The folder of an analysis: as given, or the one in the checkpoint's run, if it is there."""
    if given:
        return Path(given).expanduser()
    if checkpoint.folder.parent.name != "checkpoints":
        return None
    found = checkpoint.folder.parent.parent / FOLDER
    return found if (found / DONE_NAME).is_file() else None


def _steered(generate: Callable[[], list[Generation]], how: Variant) -> list[Generation]:
    try:
        return generate()
    except CheckpointError:  # its weights are finite: checked when it was loaded
        raise ConfigError(
            f"delta={how.delta}: the steered model gives no finite logits: give numbers of smaller"
            " size, or --dtype fp32"
        ) from None
