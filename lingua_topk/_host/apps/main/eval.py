"""What a config says of evaluation, and where its results go.

The evaluator itself is `apps.topk.eval`, which puts itself in the place of
`launch_eval` for the runs it drives, on this host as on Meta Lingua's.
"""

from dataclasses import dataclass, field
from typing import Any, Optional

from lingua.errors import ConfigError

EVAL_FOLDER_NAME = "{:010d}"


@dataclass
class LMHarnessArgs:
    """Keyword arguments of `lm_eval.simple_evaluate`."""

    tasks: Optional[list[Any]] = None  # noqa: UP045
    num_fewshot: Optional[int] = None  # noqa: UP045
    device: Optional[str] = None  # noqa: UP045
    use_cache: Optional[str] = None  # noqa: UP045
    cache_requests: bool = False
    rewrite_requests_cache: bool = False
    delete_requests_cache: bool = False
    limit: Optional[float] = None  # noqa: UP045
    bootstrap_iters: int = 100000
    check_integrity: bool = False
    write_out: bool = False
    log_samples: bool = True
    system_instruction: Optional[str] = None  # noqa: UP045
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = False
    gen_kwargs: Optional[str] = None  # noqa: UP045
    verbosity: str = "INFO"
    predict_only: bool = False
    random_seed: int = 0
    numpy_random_seed: int = 1234
    torch_random_seed: int = 1234
    fewshot_random_seed: int = 1234


@dataclass
class ValidationArgs:
    max_steps: Optional[int] = None  # noqa: UP045  (documents a source; None: all)
    use_val_from_train_src: bool = True
    root_dir: str = ""
    sources: list[str] = field(default_factory=list)


@dataclass
class EvalArgs:
    name: str = "evals"
    dump_dir: Optional[str] = None  # noqa: UP045
    metric_log_dir: Optional[str] = None  # noqa: UP045
    ckpt_dir: str = ""
    generator: Optional[Any] = None  # noqa: UP045
    harness: Optional[LMHarnessArgs] = None  # noqa: UP045
    validation: Optional[ValidationArgs] = None  # noqa: UP045
    wandb: Optional[Any] = None  # noqa: UP045
    global_step: Optional[int] = None  # noqa: UP045


def launch_eval(cfg: EvalArgs) -> None:
    raise ConfigError(
        "the embedded host's apps.main has no evaluator: evaluate with python -m apps.topk.eval"
        f" config=... ckpt_dir={cfg.ckpt_dir}, or train with apps.topk.train"
    )
