"""TopK language models: the operator, the patch, and what reads and steers them."""

from lingua_topk.config import TopKArgs
from lingua_topk.ops import topk
from lingua_topk.patch import TopKHandle, apply_topk, topk_handle

__version__ = "0.1.0"

__all__ = ["TopKArgs", "TopKHandle", "apply_topk", "topk", "topk_handle"]
