"""The nursery with actors that wait for a Redis nobody started."""

import signal
import sys
from pathlib import Path

import psutil
import pytest

from tests.nursery import Nursery

pytestmark = pytest.mark.system

WITHOUT_VLLM = (
    sys.executable,
    "-c",
    "import sys; from actors.nursery import Nursery; Nursery(sys.stdin.fileno(), sys.stdout).run()",
)
"""The same nursery without ten seconds of imports; these actors never get as far as an engine."""
WAITING = ("--redis-url", "redis://127.0.0.1:1/0", "--run-id", "nobody")


def test_an_actor_runs_with_its_arguments_and_its_log(tmp_path: Path) -> None:
    with Nursery(WITHOUT_VLLM) as nursery:
        pid = nursery.start_actor(["--help"], tmp_path / "new folder" / "help.log")
        assert nursery.wait_exit(pid) == 0
        assert "--run-id" in (tmp_path / "new folder" / "help.log").read_text()
        pid = nursery.start_actor(["--nonsense"], tmp_path / "nonsense.log")
        assert nursery.wait_exit(pid) == 2
        assert nursery.close() == 0


def test_a_line_that_is_no_order_is_refused_and_the_nursery_goes_on(tmp_path: Path) -> None:
    with Nursery(WITHOUT_VLLM) as nursery:
        nursery.send('{"args": "not a list", "log": "x"}')
        assert "args" in nursery.expect("refused")["reason"]
        nursery.send("no json")
        nursery.expect("refused")
        assert nursery.wait_exit(nursery.start_actor(["--help"], tmp_path / "log")) == 0


def test_the_end_of_stdin_ends_the_actors(tmp_path: Path) -> None:
    with Nursery(WITHOUT_VLLM) as nursery:
        actors = [psutil.Process(nursery.start_actor(WAITING, tmp_path / f"{i}.log")) for i in range(2)]
        assert nursery.close() == 0
        assert not any(actor.is_running() for actor in actors)


def test_sigterm_ends_the_actors_and_says_so(tmp_path: Path) -> None:
    with Nursery(WITHOUT_VLLM) as nursery:
        pid = nursery.start_actor(WAITING, tmp_path / "log")
        nursery.process.send_signal(signal.SIGTERM)
        assert nursery.wait_exit(pid) in (-signal.SIGTERM, 0), "before it listens to signals, or after"
        assert nursery.process.wait(30) == 0


def test_a_killed_nursery_takes_its_actors_with_it(tmp_path: Path) -> None:
    with Nursery(WITHOUT_VLLM) as nursery:
        actor = psutil.Process(nursery.start_actor(WAITING, tmp_path / "log"))
        nursery.process.kill()
        _, alive = psutil.wait_procs([actor], timeout=10)
        assert not alive


@pytest.mark.engine
def test_the_real_nursery_has_what_an_engine_needs(tmp_path: Path) -> None:
    with Nursery(timeout_s=100.0) as nursery:
        assert nursery.wait_exit(nursery.start_actor(["--help"], tmp_path / "log")) == 0
        loaded = Path(f"/proc/{nursery.process.pid}/maps").read_text()
        assert "libtorch" in loaded
        assert nursery.close() == 0
