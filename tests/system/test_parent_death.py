"""A forked engine process, as it is before it has loaded anything, and a kill -9 of the actor."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection

import psutil
import pytest

from lambdapo_async.parent_death import forked_children_end_with_us

pytestmark = pytest.mark.system

FORK = multiprocessing.get_context("fork")
TIMEOUT_S = 20.0


def wait_for_ever(ready: Connection) -> None:
    ready.send_bytes(b"child")
    multiprocessing.Pipe()[0].poll(None)


def fork_tied(ready: Connection) -> None:
    with forked_children_end_with_us():
        child = FORK.Process(target=wait_for_ever, args=(ready,))
        child.start()
    child.join()


def fork_free(ready: Connection) -> None:
    with forked_children_end_with_us():
        pass
    child = FORK.Process(target=wait_for_ever, args=(ready,))
    child.start()
    child.join()


@pytest.mark.parametrize(("fork", "survivors"), [(fork_tied, 0), (fork_free, 1)])
def test_children_forked_in_the_block_end_with_their_parent(fork: Callable[[Connection], None], survivors: int) -> None:
    ours, theirs = multiprocessing.Pipe()
    parent = FORK.Process(target=fork, args=(theirs,))
    parent.start()
    assert ours.poll(TIMEOUT_S)
    (child,) = psutil.Process(parent.pid).children()
    parent.kill()
    parent.join()
    _, alive = psutil.wait_procs([child], timeout=TIMEOUT_S if survivors == 0 else 0.2)
    for process in alive:
        process.kill()
    assert len(alive) == survivors
