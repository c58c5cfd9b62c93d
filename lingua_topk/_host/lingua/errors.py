"""Errors whose text is meant for the user.

`exit_status` is the whole agreement with the applications: an exception that
carries it is printed as one line, and the process ends with that status.
"""


class UserError(Exception):
    """Something the user can mend: the text says what is wrong and what to do."""

    exit_status = 2


class ConfigError(UserError, ValueError):
    """A configured value is not allowed."""


class DataError(UserError, ValueError):
    """A data file or folder cannot be used as it is."""


class CheckpointError(UserError):
    """A checkpoint is absent, incomplete, or does not fit the model."""
