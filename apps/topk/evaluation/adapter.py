"""The model as lm-eval asks for it.

lm-eval's `TemplateLM` divides a text into context and continuation and its own windows cut
long documents; here the token ids that it arrives at are scored and continued. All processes
of a torchrun hold the whole list of requests and share the work (see `scoring.score`), so that
lm-eval itself runs alike in each, as if it were alone.
"""

import logging
from typing import Any

import torch
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import nn
from tqdm import tqdm

from apps.topk.evaluation.scoring import Request, rank_and_size, score
from apps.topk.generation import Generator
from apps.topk.sampling import Sampling
from lingua_topk.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

MAX_GENERATED = 256  # tokens, where a task does not say; lm-eval's own default
UNDERSTOOD = {"until", "do_sample", "temperature", "top_p", "top_k"}
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class HarnessModel(TemplateLM):
    """A model and its tokenizer for `lm_eval.simple_evaluate`.

    Text is encoded with bos in front where training did so (`add_bos`), which a rolling
    likelihood is given and not asked to predict.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        window: int,
        batch_tokens: int,
        add_bos: bool = True,
        name: str = "",
        seed: int = 0,
    ):
        """window: tokens that the model sees at once; batch_tokens: tokens a batch."""
        super().__init__()
        self.model = model
        self.max_length = window
        self.batch_tokens = batch_tokens
        self.name = name
        self.seed = seed
        self.label = "texts"  # of the progress bar
        self._tokenizer = tokenizer
        bos, eos = (getattr(tokenizer, which, None) for which in ("bos_id", "eos_id"))
        if bos is None and eos is None:
            raise ConfigError(
                "the tokenizer has neither bos nor eos, one of which lm-eval's tasks put before a"
                " text without a context: leave harness out of the evaluation of this model"
            )
        self._bos, self._eos = bos, eos
        self._add_bos = add_bos and bos is not None

    @property
    def eot_token_id(self) -> int:
        return self._bos if self._eos is None else self._eos

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        return self._eos if self._bos is None else self._bos

    @property
    def tokenizer_name(self) -> str:
        return type(self._tokenizer).__name__

    def get_model_info(self) -> dict[str, Any]:
        """For the `config` of lm-eval's results."""
        parameter = next(self.model.parameters())
        return {
            "model_num_parameters": sum(p.numel() for p in self.model.parameters()),
            "model_dtype": str(parameter.dtype),
            "model_revision": self.name,
            "model_sha": "",
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs):
        """Token ids; bos in front as in training, or as `add_special_tokens` says."""
        add_bos = self._add_bos if add_special_tokens is None else add_special_tokens
        add_bos = add_bos and self._bos is not None
        return self._tokenizer.encode(string, add_bos=add_bos, add_eos=False)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False):
        """Nats and whether greedy decoding gives the continuation, of each request."""
        for context, continuation in (one.args for one in requests):
            if not context and not self.tok_encode(continuation, add_special_tokens=False):
                raise DataError("a task asks how likely an empty text is: correct its documents")
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs):
        """requests: (text pair or None, context ids, continuation ids). See `loglikelihood`."""
        asked = [Request(tuple(context), tuple(end)) for _, context, end in requests]
        n_long = sum(len(one) > self.max_length + 1 for one in asked)
        if n_long:
            logger.warning(
                "%s: %d of %d texts are longer than the %d tokens that the model sees, and are"
                " read without their beginning", self.label, n_long, len(asked), self.max_length,
            )  # fmt: skip
        for (texts, _, _), request in zip(requests, asked, strict=True):
            if not request.continuation:
                raise DataError(
                    f"a task's continuation {texts[1][:80]!r} has no token of its own after its"
                    " context: correct the task's documents"
                )
        scores = score(self.model, asked, self.max_length, self.batch_tokens, self.label)
        answers = list(zip(scores.log_likelihoods.tolist(), scores.greedy.tolist(), strict=True))
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False):
        """Nats of whole texts, in lm-eval's disjoint windows, each text's first token included.

        bos is given as what the first token follows. A model that was trained without it sees
        eos there.
        """
        texts = [one.args[0] for one in requests]
        asked, owners = [], []
        for index, text in enumerate(texts):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, windows):
                asked.append(Request(tuple(context), tuple(continuation)))
                owners.append(index)
        scores = score(self.model, asked, self.max_length, self.batch_tokens, self.label)
        totals = torch.zeros(len(texts), dtype=torch.float64)
        totals.index_add_(0, torch.tensor(owners, dtype=torch.int64), scores.log_likelihoods)
        for text, total in zip(texts, totals.tolist(), strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals.tolist()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations of texts, each cut before the first of its stop strings.

        A text that leaves no room for what is to be generated loses tokens on the left.
        """
        groups: dict[Sampling, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(self._sampling(request.args[1]), []).append(index)
        texts = [""] * len(requests)
        for sampling, members in groups.items():
            room = self.max_length - sampling.max_tokens
            prompts = {i: self.tok_encode(requests[i].args[0])[-room:] for i in members}
            for i, text in self._generate(prompts, sampling).items():
                texts[i] = text
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _generate(self, prompts: dict[int, list[int]], sampling: Sampling) -> dict[int, str]:
        """Each process continues its share of the prompts, and all get the texts."""
        rank, size = rank_and_size()
        share = list(prompts)[rank::size]
        generator = Generator(self.model, self._tokenizer, self.batch_tokens)
        with tqdm(
            total=len(share), desc=self.label, leave=False, disable=None if rank == 0 else True
        ) as bar:
            found = generator.generate_tokens(
                [prompts[i] for i in share], sampling, on_done=lambda *_: bar.update(), draws=share
            )
        texts = dict(zip(share, (one.text for one in found), strict=True))
        if size == 1:
            return texts
        parts: list[dict[int, str]] = [{}] * size
        dist.all_gather_object(parts, texts)
        return {i: text for part in parts for i, text in part.items()}

    def _sampling(self, arguments: dict[str, Any]) -> Sampling:
        """What a task's generation_kwargs ask for."""
        unknown = sorted(set(arguments) - UNDERSTOOD - set(LENGTHS))
        if unknown:
            logger.warning("generation_kwargs %s are not understood, and left out", unknown)
        asked = next((arguments[name] for name in LENGTHS if name in arguments), MAX_GENERATED)
        n_tokens = min(int(asked), max(self.max_length // 2, 1))
        if n_tokens < int(asked):
            logger.warning(
                "at most %d tokens are generated, half of what the model sees, in place of %d",
                n_tokens, int(asked),
            )  # fmt: skip
        temperature = float(arguments.get("temperature", arguments.get("do_sample", False)))
        stop = arguments.get("until") or []
        return Sampling(
            max_tokens=n_tokens,
            temperature=temperature if arguments.get("do_sample", True) else 0.0,
            top_p=float(arguments.get("top_p", 1.0)),
            top_k=int(arguments.get("top_k", 0)),
            seed=self.seed,
            stop=tuple([stop] if isinstance(stop, str) else stop),
        )
