import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lambdapo_async.cli.supervise import Child, ChildFailedError, Supervisor, exit_on_termination, last_lines
from tests.processes import is_gone, read_pid, wait_until

FOREVER = "import signal; signal.pause()"
STUBBORN = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("deaf", flush=True)
signal.pause()
"""
WITH_GRANDCHILD = """
import os, pathlib, signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.signal(15, signal.SIG_IGN); signal.pause()"])
pathlib.Path(sys.argv[1]).write_text(f"{child.pid}\\n")
"""
SUPERVISING = """
import os, pathlib, signal, sys
from lambdapo_async.cli.supervise import Supervisor, exit_on_termination
with exit_on_termination(), Supervisor(os.environ) as supervisor:
    child = supervisor.start("child", [sys.executable, "-c", "import signal; signal.pause()"], log=pathlib.Path("log"))
    pathlib.Path("pid").write_text(f"{child.pid}\\n")
    signal.pause()
"""


def start(supervisor: Supervisor, tmp_path: Path, code: str, *arguments: str) -> Child:
    return supervisor.start("the child", [sys.executable, "-c", code, *arguments], log=tmp_path / "logs" / "child.log")


def test_leaving_the_block_by_an_error_ends_the_children(tmp_path):
    children = []

    def fail() -> None:
        with Supervisor(os.environ) as supervisor:
            children.extend(start(supervisor, tmp_path, FOREVER) for _ in range(2))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert all(is_gone(child.pid) for child in children)


def test_a_child_that_ignores_term_is_killed_after_the_grace_time(tmp_path):
    with Supervisor(os.environ, grace_s=0.1) as supervisor:
        child = start(supervisor, tmp_path, STUBBORN)
        wait_until(lambda: last_lines(child.log, 1) == ["deaf"], "ignoring SIGTERM")
    assert child.poll() == -signal.SIGKILL


def test_what_an_ended_child_left_in_its_group_is_killed(tmp_path):
    with Supervisor(os.environ) as supervisor:
        child = start(supervisor, tmp_path, WITH_GRANDCHILD, str(tmp_path / "pid"))
        grandchild = read_pid(tmp_path / "pid")
        wait_until(lambda: child.poll() == 0, "the child's end")
        wait_until(lambda: is_gone(grandchild), "the grandchild's end")


def test_a_failure_shows_the_end_of_the_log(tmp_path):
    with Supervisor(os.environ) as supervisor:
        child = start(supervisor, tmp_path, "import sys; print('out'); print('why', file=sys.stderr); sys.exit(3)")
        wait_until(lambda: child.poll() is not None, "the child's end")
        with pytest.raises(ChildFailedError, match=r"the child ended with exit code 3") as error_info:
            child.require_running()
    assert "  | why" in str(error_info.value)
    assert "  | out" in str(error_info.value)


def test_a_child_gets_the_environment_it_was_given(tmp_path):
    with Supervisor({**os.environ, "REDIS_URL": "unix:///x"}) as supervisor:
        child = start(supervisor, tmp_path, "import os; print(os.environ['REDIS_URL'])")
        assert child.wait(30.0) == 0
    assert last_lines(child.log, 1) == ["unix:///x"]


def test_a_child_with_events_has_a_pipe_and_a_file_of_its_own_for_them(tmp_path):
    code = "import sys; print(sys.stdin.readline().upper()); print('noise', file=sys.stderr)"
    with Supervisor(os.environ) as supervisor:
        child = supervisor.start(
            "n", [sys.executable, "-c", code], log=tmp_path / "log", events=tmp_path / "events"
        )  # fmt: skip
        child.stdin.write(b"order\n")
        child.stdin.close()
        assert child.wait(30.0) == 0
    assert last_lines(tmp_path / "events", 9) == ["ORDER"]
    assert last_lines(tmp_path / "log", 9) == ["noise"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGKILL, -9)])
def test_a_supervisor_that_is_ended_by_a_signal_leaves_no_child(number, status, tmp_path):
    environ = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    parent = subprocess.Popen([sys.executable, "-c", SUPERVISING], cwd=tmp_path, env=environ)
    child = read_pid(tmp_path / "pid")
    parent.send_signal(number)
    assert parent.wait(30.0) == status
    wait_until(lambda: is_gone(child), "the child's end")


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with exit_on_termination():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_end_of_a_long_log_is_read_without_the_rest(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"x" * 1_000_000 + b"\n\xff\n\nlast\n")
    assert last_lines(log, 2) == ["\N{REPLACEMENT CHARACTER}", "last"]
    assert last_lines(tmp_path / "none", 2) == []
