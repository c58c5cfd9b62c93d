"""The host's language model with a `topk` section in its arguments."""

from dataclasses import dataclass, field
from typing import Optional

from apps.main.train import TrainArgs
from apps.main.transformer import LMTransformer, LMTransformerArgs
from lingua_topk import TopKArgs, apply_topk


@dataclass
class TopKTransformerArgs(LMTransformerArgs):
    """The host's model section, with TopK."""

    # Absent or null: the vanilla twin.
    topk: Optional[TopKArgs] = None  # noqa: UP045 (OmegaConf reads this spelling in all versions)


@dataclass
class TopKTrainArgs(TrainArgs):
    """The host's training config, its model with TopK."""

    model: TopKTransformerArgs = field(default_factory=TopKTransformerArgs)
    # Steps that are saved besides those of `checkpoint`, and never deleted: a trace of how
    # neurons come about needs the early ones.
    save_at: list[int] = field(default_factory=list)
    # What a gradient that is NaN or infinite does: stop (the run ends, its checkpoints are from
    # before) or skip (the step is left out and counted).
    nonfinite: str = "stop"
    # What files of the data that are not as they were when the run began do: refuse or accept.
    changed_data: str = "refuse"
    # Of the tokenizer's file; training fills it in, so that another file is noticed later.
    tokenizer_sha256: Optional[str] = None  # noqa: UP045


class TopKTransformer(LMTransformer):
    """Patched while it is built, hence before sharding and compilation."""

    def __init__(self, args: TopKTransformerArgs):
        super().__init__(args)
        if args.topk is not None:
            apply_topk(self, args.topk)
