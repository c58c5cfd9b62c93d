"""The next token of every row, from its logits: the likeliest, or one that is drawn.

All arithmetic is in float64, whatever the model's dtype. What decides a draw is one number
from the row's own generator on the CPU: the same on every device and beside any other rows.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lingua_topk.errors import ConfigError

NO_NUMBERS = -1
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Sampling:
    """How texts are continued. ConfigError for a value out of range.

    Attributes:
        max_tokens: generated tokens a text, at most.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: draw from the smallest set of likeliest tokens with at least this probability.
        top_k: draw from this many likeliest tokens, before top_p applies; 0: all.
        seed: of the draws, together with the index of the text.
        stop: strings that end a text; the first one that occurs is cut off with what follows.
        ignore_eos: never take the token that ends a text.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self):
        allowed = {
            "max_tokens": (self.max_tokens >= 1, "give at least 1"),
            "temperature": (
                math.isfinite(self.temperature) and self.temperature >= 0,
                "give 0 for the likeliest tokens, or a number above 0",
            ),
            "top_p": (0 < self.top_p <= 1, "give a number above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "give a count of tokens, or 0 for all"),
            "seed": (0 <= self.seed <= MAX_SEED, f"give 0 to {MAX_SEED}"),
            "stop": (
                not isinstance(self.stop, str) and all(self.stop),
                "give a tuple of strings, none of them empty",
            ),
        }
        for name, (is_allowed, advice) in allowed.items():
            if not is_allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not allowed: {advice}")

    def check_completions(self, num: int) -> None:
        """ConfigError where `num` completions of a prompt cannot be, or would be the same."""
        if num < 1:
            raise ConfigError(f"num={num} is not allowed: give at least 1")
        if num > 1 and self.temperature == 0:
            raise ConfigError(
                f"num={num} with temperature=0 would give the same text {num} times: give a"
                " --temperature above 0, such as 0.8"
            )


def row_generator(seed: int, index: int) -> torch.Generator:
    """The generator of the text with that index, on the CPU."""
    # torch uses 32 bits of a seed. With an odd factor no two of 2^32 texts share theirs, and
    # with the digest two seeds do not give the same ones to neighbouring texts.
    start = int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=4).digest(), "little")
    return torch.Generator().manual_seed((start + index * 0x9E3779B1) % 2**32)


def next_tokens(
    logits: Tensor, allowed: Tensor, sampling: Sampling, draws: Sequence[torch.Generator]
) -> list[int]:
    """A token for every row; NO_NUMBERS where its logits hold NaN or no finite maximum.

    logits: [B, V], any floating dtype; allowed: bool [V]; draws: a generator a row, which gives
    one number unless the temperature is 0.
    """
    wide = logits.double().masked_fill(~allowed, -torch.inf)  # [B, V]
    peaks = wide.amax(dim=-1, keepdim=True)  # [B, 1], NaN where the row has one
    if sampling.temperature == 0:
        chosen = wide.argmax(dim=-1)  # [B], the first of several
    else:
        # Relative to the peak, so that a temperature near 0 does not overflow.
        kept = ((wide - peaks) / sampling.temperature).masked_fill(~allowed, -torch.inf)
        kept = nucleus(likeliest(kept, sampling.top_k), sampling.top_p)
        numbers = [torch.rand((), dtype=torch.float64, generator=one) for one in draws]
        chosen = _drawn(kept.softmax(dim=-1), torch.stack(numbers).to(logits.device))
    return torch.where(peaks[:, 0].isfinite(), chosen, NO_NUMBERS).tolist()


def likeliest(logits: Tensor, k: int) -> Tensor:
    """[B, V] with -inf for all but the k largest of a row; of equal ones the first count.

    k = 0 keeps all.
    """
    if not 0 < k < logits.shape[-1]:
        return logits
    threshold = logits.topk(k, dim=-1).values[:, -1:]  # [B, 1]
    above = logits > threshold
    ties = logits == threshold
    places = k - above.sum(dim=-1, keepdim=True)  # [B, 1], left for the ties
    kept = above | (ties & (ties.cumsum(dim=-1) <= places))
    return logits.masked_fill(~kept, -torch.inf)


def nucleus(logits: Tensor, p: float) -> Tensor:
    """[B, V] with -inf outside the smallest set of likeliest tokens of probability >= p.

    Of equally likely ones the first count. p = 1 keeps all; at least one is kept.
    """
    if p >= 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    reached = ordered.softmax(dim=-1).cumsum(dim=-1)
    dropped = F.pad(reached[:, :-1], (1, 0)) >= p  # those before it reach p already, [B, V]
    return logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)


def _drawn(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """Of every row the token in whose share of [0, 1) its number lies: int64 [B].

    probabilities: [B, V]; numbers: [B], in [0, 1).
    """
    reached = probabilities.cumsum(dim=-1)  # [B, V]
    places = torch.searchsorted(reached, numbers[:, None] * reached[:, -1:], right=True)
    places = places.clamp(max=probabilities.shape[-1] - 1)
    # A parallel sum may be out of order in its last bit, and land on a token that is excluded.
    possible = probabilities.gather(-1, places) > 0
    return torch.where(possible, places, probabilities.argmax(dim=-1, keepdim=True))[:, 0]
