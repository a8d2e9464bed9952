"""What a user can get wrong. The command line prints such an error without a traceback and exits with code 2."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A user's mistake: the message says where, what, the value and the remedy."""


class ConfigError(UserError):
    """A setting that is unknown, of the wrong type, out of range or contradicts another."""


class DataError(UserError):
    """Text or token files that are missing, damaged or do not fit the model."""


class CheckpointError(UserError):
    """A checkpoint or storage that is missing, damaged or holds something else."""


class DamagedError(CheckpointError):
    """The checkpoint that is read is not whole: an older one may be. What was made of it is of no use."""


class StorageUnavailableError(CheckpointError):
    """Storage that failed in a way that may pass, such as one that did not answer to the end: no sign of damage."""


class MissingFileError(CheckpointError):
    """A file that is not there."""


class UndeletableError(CheckpointError):
    """Storage that can be written does not let us delete."""


class StorageError(Exception):
    """Storage failed where the run cannot go on without it: no mistake of the user's, a restart may help."""


class RolledBackError(Exception):
    """A stretch of training was undone, on all ranks alike: the next attempt begins before it."""


class FinishedRunError(Exception):
    """No mistake and no failure: the run in out_dir is at its end, and nothing is left to do. The message says so."""


def nearest(word: str, options: Iterable[str]) -> str:
    """Return `; did you mean X?` for the option that looks most like word, or nothing."""
    near = difflib.get_close_matches(word, list(options), n=1)
    return f"; did you mean {near[0]}?" if near else ""
