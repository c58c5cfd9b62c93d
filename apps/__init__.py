"""The applications. `apps.main` is the chosen host's: see `lingua_topk.host`."""

from lingua_topk.host import bind_or_exit

bind_or_exit(__path__)
