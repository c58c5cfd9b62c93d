"""The suite runs on the embedded host; tests/host_contract starts others in subprocesses."""

import os

os.environ["LINGUA_TOPK_HOST"] = "embedded"

import apps  # noqa: F401  (binds `lingua` before a test imports it)
