"""Which model a run is: what makes two runs comparable."""

from collections.abc import Hashable
from dataclasses import dataclass

from apps.topk.comparison.fields import EVALUATE_AGAIN, Fields, as_number
from lingua_topk.errors import DataError, UserError


@dataclass(frozen=True)
class TopK:
    """The TopK section of a model, with the blocks that it stands for."""

    k: int
    layers: tuple[int, ...]
    site: str | None
    activation: str | None


@dataclass(frozen=True)
class Model:
    """What an evaluation says of the model it is of; None where it does not.

    Attributes:
        tokens: that it was trained on.
        steps: of its training, as planned; `step` is the one that was evaluated.
        topk: None for a vanilla model.
        tokenizer: tells whether two models cut text into the same tokens.
    """

    name: str
    dim: int
    n_layers: int
    vocab_size: int
    parameters: int | None
    tokens: int | None
    steps: int | None
    step: int | None
    topk: TopK | None
    tokenizer: Hashable

    @property
    def n_nontopk_layers(self) -> int:
        return self.n_layers - (len(self.topk.layers) if self.topk else 0)


def read_model(origin: Fields) -> Model:
    """The model of an evaluation. DataError where neither it nor its checkpoint tells.

    origin: the provenance of the evaluation.
    """
    step = origin.whole_or_none("step")
    if origin.content.get("model") is None:  # written by an older version
        model, step = _of_checkpoint(origin)
    else:
        model = origin.section("model")
    return Model(
        name=model.text("name") or "unnamed",
        dim=model.whole("dim"),
        n_layers=model.whole("n_layers"),
        vocab_size=model.whole("vocab_size"),
        parameters=model.whole_or_none("parameters"),
        tokens=model.whole_or_none("tokens"),
        steps=model.whole_or_none("steps"),
        step=step,
        topk=_topk(model),
        tokenizer=_tokenizer(model.section("tokenizer")),
    )


def _topk(model: Fields) -> TopK | None:
    if model.content.get("topk") is None:
        return None
    topk = model.section("topk")
    layers = topk.content.get("layers")
    if isinstance(layers, list):
        chosen = tuple(int(number) for one in layers if (number := as_number(one)) is not None)
    else:
        chosen = tuple(range(model.whole("n_layers") - topk.whole("n_last_nontopk")))
    return TopK(topk.whole("k"), chosen, topk.text("site"), topk.text("activation"))


def _tokenizer(told: Fields) -> Hashable:
    """Its name, and its content or else where it lies."""
    checksum = told.text("sha256")
    return told.text("name"), checksum or told.text("path")


def _of_checkpoint(origin: Fields) -> tuple[Fields, int | None]:
    """The model and the step as the checkpoint itself tells them."""
    from apps.topk.checkpoint import open_checkpoint  # with torch, and few need it

    folder = origin.text("checkpoint")
    try:
        checkpoint = open_checkpoint(folder or "")
    except UserError:
        raise DataError(
            f"{origin.place} does not describe the model, and its checkpoint ({folder}) cannot be"
            f" opened from here: {EVALUATE_AGAIN}"
        ) from None
    return Fields(checkpoint.describe(), f"{folder}"), checkpoint.step
