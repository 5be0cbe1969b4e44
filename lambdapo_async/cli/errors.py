"""What every command does with an error: one line for those raised on purpose, a traceback for bugs."""

import sys
from collections.abc import Sequence
from typing import NoReturn

import typer

from lambdapo_async.errors import LambdaPOError, UserError

USER_ERROR_STATUS = 2
"""Exit code of everything that the user can fix; typer's own usage errors have it too."""
RUN_ERROR_STATUS = 1
INTERRUPTED_STATUS = 130


def run_main(app: typer.Typer, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run ``app`` and exit the process: 2 for a ``UserError``, 1 for other errors of ours, 130 for Ctrl-C.

    Args:
        app: made with ``pretty_exceptions_enable=False``, so that a bug shows Python's own traceback.
        arguments: without the program's name; None takes the process's.
    """
    try:
        app(args=None if arguments is None else list(arguments))
    except UserError as error:
        _exit_with(error, USER_ERROR_STATUS)
    except LambdaPOError as error:
        _exit_with(error, RUN_ERROR_STATUS)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED_STATUS)
    sys.exit(0)


def _exit_with(error: LambdaPOError, status: int) -> NoReturn:
    sys.stderr.write(f"error: {error}\n")
    sys.exit(status)
