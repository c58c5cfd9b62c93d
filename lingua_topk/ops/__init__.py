"""The operator. `definition` is the reference; faster backends stand beside it."""

from lingua_topk.ops.topk import topk, topk_sum

__all__ = ["topk", "topk_sum"]
