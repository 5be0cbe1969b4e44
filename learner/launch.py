"""`python -m learner.launch NUM_RANKS CONFIG ...`: the learner on several GPUs of this machine, under torchrun.

torchrun ends with a traceback and exit code 1 whatever its ranks ended with: here the code is theirs, for whoever
starts a learner again must know whether that can help. And a SIGTERM is the ranks' to act on, in their own time:
torchrun would kill those that do not end at once, and call it a failure.
"""

import os
import signal
import sys
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from lambdapo_async.cli.errors import RUN_ERROR_STATUS, USER_ERROR_STATUS

_SIGNAL_STATUS = 128
"""A shell's exit code of what a signal ended, before the signal's number is added."""


def launch(num_ranks: str, arguments: Sequence[str]) -> NoReturn:
    """Run the learner's ranks to their end, and exit with their code."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _pass_on)
    options = ("--standalone", "--nproc-per-node", num_ranks, "--signals-to-handle", "SIGHUP,SIGQUIT")
    try:
        torchrun.main([*options, "-m", "learner", *arguments])
    except ChildFailedError as error:
        sys.exit(common_status([failure.exitcode for failure in error.failures.values()]))
    except SignalException as error:
        sys.exit(_SIGNAL_STATUS + error.sigval)
    sys.exit(0)


def common_status(codes: Collection[int]) -> int:
    """The exit code of ranks of which one failed: the others report that they lost it, or were killed for that."""
    return USER_ERROR_STATUS if USER_ERROR_STATUS in codes else RUN_ERROR_STATUS


def _pass_on(number: int, _: FrameType | None) -> None:
    ranks = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    if not ranks:
        sys.exit(_SIGNAL_STATUS + number)
    for rank in ranks:
        with suppress(ProcessLookupError):
            os.kill(int(rank), number)


if __name__ == "__main__":
    launch(sys.argv[1], sys.argv[2:])
