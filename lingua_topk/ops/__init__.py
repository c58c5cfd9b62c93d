"""The operator. `definition` is the reference; faster backends stand beside it."""

from lingua_topk.ops.topk import topk

__all__ = ["topk"]
