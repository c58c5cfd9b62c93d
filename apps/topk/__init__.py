"""Train, evaluate and read TopK language models, in the manner of Lingua's apps."""

import apps
from lingua_topk.host import bind_or_exit

# Ours, unless this folder is linked into a checkout of Meta Lingua, whose `apps` binds nothing.
bind_or_exit(apps.__path__)

from apps.topk.lingua_host import supply_missing_or_exit  # noqa: E402

supply_missing_or_exit()
