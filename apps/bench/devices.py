"""The devices that a benchmark takes by name."""

import torch

from lingua_topk.errors import ConfigError


def check_device(device: str) -> None:
    """ConfigError unless it is cpu, or cuda where there is one."""
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"device={device!r} is not known: choose cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: torch sees no CUDA device here; choose cpu")
