"""The model as lm-eval asks for it.

lm-eval's `TemplateLM` divides a text into context and continuation and its own windows cut
long documents; here the token ids that it arrives at are scored and continued. All processes
of a torchrun hold the whole list of requests and share the work (see `scoring.score`), so that
lm-eval itself runs alike in each, as if it were alone.
"""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import nn
from tqdm import tqdm

from apps.topk.cli import one_line
from apps.topk.evaluation.processes import in_all, rank_and_size
from apps.topk.evaluation.scoring import Request, score
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
    likelihood is given and not asked to predict; what has no context follows bos then, else
    eos.
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
        self.label = "texts"  # of the progress bar, and in messages
        self._warned: set[tuple[str, str]] = set()
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
        return self._bos if self._add_bos or self._eos is None else self._eos

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
        """Nats and whether greedy decoding gives the continuation, of each request.

        An empty continuation is certain.
        """
        self._check_texts(text for one in requests for text in one.args)
        asked = [index for index, one in enumerate(requests) if one.args[1]]
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        found = super().loglikelihood([requests[index] for index in asked], disable_tqdm=True)
        for index, answer in zip(asked, found, strict=True):
            answers[index] = answer
        return answers

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs):
        """requests: (text pair, context ids, continuation ids). See `loglikelihood`."""
        asked = [self._request(context, end) for _, context, end in requests]
        n_merged = sum(not end for _, _, end in requests)
        if n_merged:
            logger.warning(
                "%s: in %d of %d texts one token spans the end of the context and the whole"
                " continuation; it is scored", self.label, n_merged, len(asked),
            )  # fmt: skip
        n_long = sum(len(one) > self.max_length + 1 for one in asked)
        if n_long:
            logger.warning(
                "%s: %d of %d texts are longer than the %d tokens that the model sees, and are"
                " read without their beginning", self.label, n_long, len(asked), self.max_length,
            )  # fmt: skip
        scores = score(self.model, asked, self.max_length, self.batch_tokens, self.label)
        return list(zip(scores.log_likelihoods.tolist(), scores.greedy.tolist(), strict=True))

    def _request(self, context: list[int], end: list[int]) -> Request:
        if not end:
            context, end = context[:-1], context[-1:]
        return Request(tuple(context) or (self.prefix_token_id,), tuple(end))

    def _check_texts(self, texts: Iterable[Any]) -> None:
        for text in texts:
            if not isinstance(text, str):
                raise DataError(
                    f"{self.label}: {one_line(repr(text))[:80]} is not text: correct the task's"
                    " documents or its templates"
                )

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False):
        """Nats of whole texts, in lm-eval's disjoint windows, each text's first token included.

        The first token follows `prefix_token_id`.
        """
        texts = [one.args[0] for one in requests]
        self._check_texts(texts)
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
        return totals.tolist()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations of texts, each cut before the first of its stop strings.

        A text that leaves no room for what is to be generated loses tokens on the left.
        """
        self._check_texts(one.args[0] for one in requests)
        groups: dict[Sampling, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(self._sampling(request.args[1]), []).append(index)
        texts = [""] * len(requests)
        for sampling, members in groups.items():
            room = self.max_length - sampling.max_tokens
            encoded = {i: self.tok_encode(requests[i].args[0]) for i in members}
            prompts = {i: ids[-room:] or [self.prefix_token_id] for i, ids in encoded.items()}
            for i, text in self._generate(prompts, sampling).items():
                texts[i] = text
        return texts

    def _generate(self, prompts: dict[int, list[int]], sampling: Sampling) -> dict[int, str]:
        """Each process continues its share of the prompts, and all get the texts."""
        rank, size = rank_and_size()
        share = list(prompts)[rank::size]
        generator = Generator(self.model, self._tokenizer, self.batch_tokens)
        bar = tqdm(
            total=len(share), desc=self.label, leave=False, disable=None if rank == 0 else True
        )

        def work() -> dict[int, str]:
            found = generator.generate_tokens(
                [prompts[i] for i in share], sampling, on_done=lambda *_: bar.update(), draws=share
            )
            return dict(zip(share, (one.text for one in found), strict=True))

        with bar:
            parts = in_all(work)
        return {i: text for part in parts for i, text in part.items()}

    def _sampling(self, arguments: dict[str, Any]) -> Sampling:
        """What a task's generation_kwargs ask for."""
        unknown = sorted(set(arguments) - UNDERSTOOD - set(LENGTHS))
        if unknown:
            self._warn(f"generation_kwargs {unknown} are not understood, and left out")
        lengths = (arguments.get(name) for name in LENGTHS)
        asked = int(next((one for one in lengths if one is not None), MAX_GENERATED))
        n_tokens = min(asked, max(self.max_length // 2, 1))
        if n_tokens < asked:
            self._warn(
                f"at most {n_tokens} tokens are generated, half of what the model sees, in place"
                f" of {asked}"
            )
        temperature = float(arguments.get("temperature", arguments.get("do_sample", False)))
        stop = arguments.get("until") or []
        try:
            return Sampling(
                max_tokens=n_tokens,
                temperature=temperature if arguments.get("do_sample", True) else 0.0,
                top_p=float(arguments.get("top_p", 1.0)),
                top_k=max(int(arguments.get("top_k", 0)), 0),  # -1: all, in other libraries
                seed=self.seed,
                stop=tuple(one for one in ([stop] if isinstance(stop, str) else stop) if one),
            )
        except ConfigError as error:
            raise DataError(f"{self.label}: its generation_kwargs: {error}") from None

    def _warn(self, text: str) -> None:
        """Once a task, where every request says the same."""
        if (self.label, text) not in self._warned:
            self._warned.add((self.label, text))
            logger.warning("%s: %s", self.label, text)
