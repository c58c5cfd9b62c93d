"""Imported before processes are forked (tests/processes.py): lm-eval, and what it reads once."""

import lm_eval
from torch.utils import collect_env

from apps.topk.evaluation import adapter
from tests.apps.lm_eval_once import read_once

__all__ = ["adapter", "lm_eval"]

_ONCE = read_once()
_ONCE.__enter__()
collect_env.get_pretty_env_info()
