"""Where a model runs."""

import torch

from lingua_topk.errors import ConfigError


def device_of(name: str) -> torch.device:
    """The device called `name`; for "" CUDA where there is one. ConfigError for another."""
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        device = torch.device(name or ("cuda" if there else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={name!r} is not known: give cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= there:
        raise ConfigError(f"device={name!r} is not there (CUDA devices: {there}): give cpu")
    return device
