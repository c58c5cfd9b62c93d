"""Errors whose text is meant for the user, not for us.

Every message names the field, its value, what is allowed and what to do. The
applications print it as one line and end with `exit_status`; any other exception
is a bug of ours and keeps its traceback.
"""


class UserError(Exception):
    """Something the user can mend; the application ends with `exit_status`."""

    exit_status = 2


class ConfigError(UserError, ValueError):
    """A value in a config, on a command line or in a call is not allowed."""


class HostError(UserError):
    """The host (Meta Lingua or the embedded one) is absent or not what is needed."""


class DataError(UserError, ValueError):
    """A data file or folder cannot be used as it is."""


class CheckpointError(UserError):
    """A checkpoint is absent, incomplete, or of another kind than asked for."""
