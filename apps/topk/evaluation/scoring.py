"""Log-likelihoods of continuations given their contexts.

Continuations that share a context are read in one row: the context once, each continuation
behind it at its own positions, seeing the context and itself. What is not scored is never
projected onto the vocabulary. The log-softmax is in float32 or better and sums are in
float64, whatever the model's dtype.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from apps.topk.evaluation.processes import rank_and_size
from apps.topk.inference import CAUSAL, hidden_states, visible, window_of
from lingua_topk.errors import CheckpointError

logger = logging.getLogger(__name__)

# Shorter contexts are read once more rather than behind a mask, which attention is slower with.
LEAST_SHARED_CONTEXT = 8
# Logits that are held at once.
LOGITS_CHUNK = 2**24
PADDING = -1


@dataclass(frozen=True)
class Request:
    """Token ids, each side at least one: how likely is `continuation` after `context`?"""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.context) + len(self.continuation)


@dataclass
class Row:
    """Tokens that are read together: a context, and continuations of it, each of a request.

    The last token of a continuation is predicted and not read. What a row is made of is
    written out when it is read, since there can be millions of tokens.
    """

    context: tuple[int, ...]
    ends: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)  # request, tokens

    def __len__(self) -> int:
        return len(self.context) + sum(len(end) - 1 for _, end in self.ends)

    @property
    def is_causal(self) -> bool:
        """Whether every token sees all before it: at most one continuation is read."""
        return sum(len(end) > 1 for _, end in self.ends) <= 1

    @property
    def tokens(self) -> list[int]:
        return [*self.context, *(token for _, end in self.ends for token in end[:-1])]

    @property
    def positions(self) -> list[int]:
        n = len(self.context)
        return [*range(n), *(i for _, end in self.ends for i in range(n, n + len(end) - 1))]

    @property
    def segments(self) -> list[int]:
        """Segment 0 is the context, which all see; the others see it and themselves."""
        numbered = enumerate(self.ends, start=1)
        return [0] * len(self.context) + [i for i, (_, end) in numbered for _ in end[:-1]]

    @property
    def predictions(self) -> list[tuple[int, int, int]]:
        """The place in the row that it is made from, the token, and the request, of each."""
        found, place = [], len(self.context)
        for request, end in self.ends:
            places = [len(self.context) - 1, *range(place, place + len(end) - 1)]
            found += [(where, token, request) for where, token in zip(places, end, strict=True)]
            place += len(end) - 1
        return found


@dataclass
class Scores:
    """Of every request: nats, float64 [N]; and whether each token was the likeliest, bool [N]."""

    log_likelihoods: Tensor
    greedy: Tensor


def rows_of(requests: Sequence[Request], window: int, share_contexts: bool = True) -> list[Row]:
    """The rows that score all requests, each of at most `window` tokens.

    A context that is too long with its continuation loses tokens on the left. A continuation
    that is longer than the window by itself is scored in pieces of that length.
    """
    rows: list[Row] = []
    open_rows: dict[tuple[int, ...], Row] = {}
    for index, request in enumerate(requests):
        for context, piece in _pieces(request, window):
            row = open_rows.get(context)
            if row is None or len(row) + len(piece) - 1 > window:
                row = Row(context)
                rows.append(row)
                if share_contexts and len(context) >= LEAST_SHARED_CONTEXT:
                    open_rows[context] = row
            row.ends.append((index, piece))
    return rows


def _pieces(request: Request, window: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Contexts and what is scored after them, so that all but the last token fit the window."""
    tokens = request.context + request.continuation
    for start in range(len(request.context), len(tokens), window):
        piece = tokens[start : start + window]
        yield tokens[max(start + len(piece) - window - 1, 0) : start], piece


def batches_of(rows: Sequence[Row], batch_tokens: int) -> list[list[Row]]:
    """Rows of similar length together, at most `batch_tokens` tokens with the padding.

    The longest come first, so that what does not fit into memory shows at once; a single
    longer row is a batch of its own.
    """
    batches: list[list[Row]] = []
    # Rows without a mask stay among themselves.
    for row in sorted(rows, key=lambda row: (not row.is_causal, len(row)), reverse=True):
        last = batches[-1] if batches else None
        if (
            last
            and last[0].is_causal == row.is_causal
            and (len(last) + 1) * len(last[0]) <= batch_tokens
        ):
            last.append(row)
        else:
            batches.append([row])
    return batches


@torch.inference_mode()
def score(
    model: nn.Module,
    requests: Sequence[Request],
    window: int,
    batch_tokens: int,
    label: str = "scoring",
    share_contexts: bool = True,
    before: Callable[[Tensor], None] | None = None,
) -> Scores:
    """The scores of all requests, in their order.

    All processes call it with the same requests and get the same; each reads its share.
    window: tokens that the model sees at once; batch_tokens: tokens a batch, padding included;
    share_contexts: whether to read continuations of one context in one row; before: called
    before each forward with the places that something is predicted from, bool [B, S].
    CheckpointError where the model gives no numbers.
    """
    rank, size = rank_and_size()
    device = next(model.parameters()).device
    rows = rows_of(requests, window, share_contexts)
    batches = batches_of(rows, batch_tokens)[rank::size]
    totals = torch.zeros(len(requests), dtype=torch.float64, device=device)
    misses = torch.zeros(len(requests), dtype=torch.int64, device=device)
    with _progress(label, batches, rank) as bar:
        for batch in batches:
            losses, hits, owners = _scored(model, batch, device, before)
            totals.index_add_(0, owners, -losses.double())
            misses.index_add_(0, owners, (~hits).long())
            bar.update(sum(map(len, batch)))
    if size > 1:
        dist.all_reduce(totals)
        dist.all_reduce(misses)
    _check_finite(totals)
    return Scores(totals.cpu(), (misses == 0).cpu())


def _progress(label: str, batches: list[list[Row]], rank: int) -> tqdm:
    """A bar over tokens, since the batches at the end are the quick ones."""
    n_tokens = sum(len(row) for batch in batches for row in batch)
    logger.info("%s: %s tokens in %d batches", label, f"{n_tokens:,}", len(batches))
    return tqdm(
        total=n_tokens, desc=label, unit="tok", unit_scale=True, leave=False,
        disable=None if rank == 0 else True,
    )  # fmt: skip


def _scored(
    model: nn.Module,
    batch: list[Row],
    device: torch.device,
    before: Callable[[Tensor], None] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of every prediction of a batch: nats, whether it is the likeliest, its request; [M] each."""
    tokens, positions, segments = (x.to(device) for x in _padded(batch))  # [B, S]
    # Row of the batch, place in the row, token, request.
    found = [(i, *prediction) for i, row in enumerate(batch) for prediction in row.predictions]
    rows, places, targets, owners = torch.tensor(found, device=device).unbind(1)  # [M]
    if before is not None:
        is_scored = torch.zeros_like(tokens, dtype=torch.bool)
        is_scored[rows, places] = True
        before(is_scored)
    sliding = window_of(model)
    causal = batch[0].is_causal and sliding is None
    mask = CAUSAL if causal else _mask(positions, segments, sliding)
    h = hidden_states(model, tokens, positions, mask)[rows, places]  # [M, D]
    losses, hits = [], []
    size = max(LOGITS_CHUNK // model.tok_embeddings.num_embeddings, 1)
    for part, wanted in zip(h.split(size), targets.split(size), strict=True):
        logits = model.output(part)  # [m, V]
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses.append(F.cross_entropy(wide, wanted, reduction="none"))
        hits.append(wide.argmax(dim=-1) == wanted)
    return torch.cat(losses), torch.cat(hits), owners


def _padded(batch: list[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, positions and segments of the rows, int64 [B, S], padded at the end."""
    shape = len(batch), max(map(len, batch))
    tokens, positions = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))
    segments = torch.full(shape, PADDING)
    for i, row in enumerate(batch):
        n = len(row)
        tokens[i, :n] = torch.tensor(row.tokens)
        positions[i, :n] = torch.tensor(row.positions)
        segments[i, :n] = torch.tensor(row.segments)
    return tokens, positions, segments


def _mask(positions: Tensor, segments: Tensor, window: int | None) -> Tensor:
    """Which token sees which: bool [B, S, S] of positions and segments, [B, S].

    Padding sees itself, since a row that sees nothing would become NaN.
    """
    shared = segments[:, None, :] == 0
    own = segments[:, :, None] == segments[:, None, :]
    return visible(positions, positions, window) & (shared | own)


def _check_finite(totals: Tensor) -> None:
    n_bad = int((~totals.isfinite()).sum())
    if n_bad:
        raise CheckpointError(
            f"the model gives no finite log-likelihood for {n_bad} of {len(totals)} texts: its"
            " outputs overflow, or hold NaN; evaluate it with dtype=fp32, or use an earlier"
            " checkpoint"
        )
