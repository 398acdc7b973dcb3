"""The errors that reach a user: each carries one line that names the cause and the remedy.

`cli.main` prints the line and exits with `exit_code`; anything else is a defect and keeps its
traceback.
"""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for a message of ours; its kind where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class OpdError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code = 1


class ConfigError(OpdError):
    """A recipe, an override or a command-line flag is wrong. The message names the key."""

    exit_code = 2


class DataError(OpdError):
    """A file the user named (data set, model directory, checkpoint) is missing or wrong. The
    message names it."""

    exit_code = 2


class RunError(OpdError):
    """A run cannot go on: a dead engine, weights that did not arrive, non-finite losses."""

    exit_code = 1


class Interrupted(OpdError):
    """The user asked the run to stop (Ctrl-C, SIGTERM); it was saved and can be resumed."""

    exit_code = 130


class OutOfTime(OpdError):
    """The job's time limit is near (SIGUSR1); the run was saved and goes on in the next job."""

    exit_code = 75
