"""How the tensors of a checkpoint are written: as torch.distributed.checkpoint does, plainer said.

Imported where it is used, like all of torch.distributed.checkpoint.
"""

from typing import Any

from torch.distributed.checkpoint import FileSystemWriter

from lingua._files import system_error


class Writer(FileSystemWriter):
    """What the system refuses is an OSError, also where torch's own writer stumbles over it."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            raise system_error(error) or error from None
