"""How long a process waits for another, in a collective or to begin, before it ends."""

import os
from datetime import timedelta

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from lingua._peers import TIMEOUT_NAME
from lingua.errors import ConfigError

# Of torch's own, half an hour on gloo is long for devices that stand still; NCCL's is this.
SECONDS = 600.0
_LONGEST = 7 * 86400


def get_timeout() -> timedelta:
    """What the environment says, or ten minutes. ConfigError where it names no such time."""
    given = os.environ.get(TIMEOUT_NAME, "")
    try:
        seconds = float(given or SECONDS)
        if 1 <= seconds <= _LONGEST:
            return timedelta(seconds=seconds)
    except ValueError:
        pass
    raise ConfigError(
        f"{TIMEOUT_NAME}={given!r} is not allowed: give the seconds that a process waits for"
        f" another, from 1 to {_LONGEST}"
    )


def set_timeout(mesh: DeviceMesh) -> None:
    """Have the groups of a mesh wait as long: torch makes them with its default."""
    for name in mesh.mesh_dim_names or ():
        _set_pg_timeout(get_timeout(), mesh.get_group(name))
