"""One run under faults: its Redis, its learner, its actors, and whoever starts them again."""

import contextlib
import json
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from pathlib import Path

import redis

from lambdapo_async.keys import RunKeys
from tests.chaos.actor_process import run_actor_process
from tests.chaos.fault_points import disarm
from tests.chaos.folders import bytes_below
from tests.chaos.learner_process import run_learner_process, write_model_files
from tests.chaos.ledger import SUFFIX, Entry, Ledger
from tests.chaos.profiles import Profile
from tests.chaos.proxy import Proxy
from tests.chaos.redis_control import RedisControl, held_bytes
from tests.chaos.spec import RUN_ID, VARIANTS, ProcessSpec, Variant, output_dir, spool_dir, write_config
from tests.chaos.zygote import Forked

NUM_ACTORS = 2
STUCK_S = 60.0
"""Without a step for this long, while nothing is being broken, a run counts as stuck."""
_EXIT_S = 40.0
_TEND_S = 0.02
_SAMPLE_S = 0.2
_FOREVER = 1_000_000
_LAST_STEPS = 6


class StuckError(AssertionError):
    """The run does not go on, or does not end."""


class Scene:
    """Starts everything, keeps it going, ends it; faults are somebody else's."""

    def __init__(
        self,
        folder: Path,
        profile: Profile,
        *,
        seed: int,
        num_steps: int | None = None,
        mutant: str = "",
        stuck_s: float = STUCK_S,
        variant: Variant = VARIANTS[0],
    ) -> None:
        """Starts nothing yet.

        Args:
            folder: short, and on storage whose fsync is cheap.
            num_steps: after which the run ends; None lets :meth:`finish` decide, with a learner started anew.
        """
        self.folder, self.profile, self.variant, self._mutant = folder, profile, variant, mutant
        self.seed, self._num_steps, self._stuck_s = seed, num_steps, stuck_s
        self.ledger = Ledger(folder, "scene")
        self.redis = RedisControl(folder / "r", profile.persistence)
        self.proxy: Proxy | None = None
        self.learner: Forked | None = None
        self.actors: list[Forked] = []
        self.sleepers: list[Forked] = []
        """Learners that were replaced while they slept."""
        self.exits: Counter[str] = Counter()
        """Processes that ended by themselves, by what they said."""
        self.points: Counter[str] = Counter()
        """Fault points at which a process killed itself."""
        self.redis_is_up = False
        self._later: list[tuple[float, Callable[[], None]]] = []
        self._started: Counter[str] = Counter()
        self._expected: set[str] = set()
        self._read: dict[Path, int] = {}
        self.newest_step = 0
        self._is_finishing = num_steps is not None
        """Whether a learner that ends with 0 has ended the run."""
        self._sampled_at = 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Everything is up, with a first step made; nothing is left behind."""
        write_model_files(self.folder)
        write_config(self.folder, self.variant, seed=self.seed, num_steps=self._num_steps or _FOREVER)
        self.start_redis()
        if self.profile.proxy:
            self.proxy = Proxy(self.folder / "p", self.redis.socket, hides_run_id=self.profile.hides_run_id)
        try:
            self.start_learner()
            self.wait_for_step(stuck_s=STUCK_S)  # a broken learner has to start like any other
            yield
        finally:
            self._end_everything()

    @property
    def url(self) -> str:
        return self.proxy.url if self.proxy else self.redis.url

    def start_redis(self) -> None:
        self.redis.start()
        self.redis_is_up = True

    def start_learner(self) -> None:
        resume = any((output_dir(self.folder) / RUN_ID / "checkpoints").glob("step-*"))
        self.learner = Forked(run_learner_process, self._spec("learner", resume=resume))

    def start_actor(self) -> None:
        self.actors.append(Forked(run_actor_process, self._spec("actor")))

    def expect_end(self, process: Forked) -> None:
        """Its end, however it comes, is not by itself."""
        self._expected.add(process.who)

    def later(self, delay_s: float, action: Callable[[], None]) -> None:
        self._later.append((time.monotonic() + delay_s, action))

    def tend(self, duration_s: float) -> None:
        """Keep everything going for a while: start what ended, do what is due, look at the bytes."""
        deadline = time.monotonic() + duration_s
        while True:
            self._tend_once()
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return
            sentinels = [process.sentinel for process in self._processes() if process.returncode is None]
            wait(sentinels, timeout=min(left_s, _TEND_S))

    def wait_for_step(self, count: int = 1, *, stuck_s: float | None = None) -> None:
        """Until the run is ``count`` steps further than it ever was; ``stuck_s`` is the scene's own by default."""
        stuck_s = self._stuck_s if stuck_s is None else stuck_s
        goal, deadline = self.newest_step + count, time.monotonic() + stuck_s
        while self.newest_step < goal:
            self.tend(_TEND_S)
            if time.monotonic() > deadline:
                self._show_stacks()
                raise StuckError(f"no new step for {stuck_s:g} s after step {self.newest_step}")

    def wait_for_end(self, process: Forked) -> None:
        """Until it is dead."""
        deadline = time.monotonic() + self._stuck_s
        while process.returncode is None:
            self.tend(_TEND_S)
            if time.monotonic() > deadline:
                raise StuckError(f"{process.who} did not come to its end within {self._stuck_s:g} s")

    def finish(self, trouble: Callable[[], None] | None = None) -> None:
        """Let the run end by itself a few steps from now; ``trouble`` comes while it does."""
        for process in self._processes():
            disarm(self.folder, process.who)
        while self._later:
            self.tend(_TEND_S)
        if self._num_steps is None:
            self.wait_for_step()
            write_config(self.folder, self.variant, seed=self.seed, num_steps=self.newest_step + _LAST_STEPS)
            assert self.learner is not None
            self.expect_end(self.learner)
            self.learner.send(signal.SIGTERM)
            self._is_finishing = True
        if trouble is not None:
            trouble()
        self._wait_for_the_learner()
        while self._later:  # the others need a Redis that is well to come to their end
            self.tend(_TEND_S)
        self._wait_for_the_others()

    def stop_processes(self) -> None:
        """Kill all but Redis, which still has its part to tell."""
        for process in self._processes():
            process.kill()

    def _wait_for_the_learner(self) -> None:
        newest, deadline = self.newest_step, time.monotonic() + 2 * self._stuck_s
        while self.learner is not None:
            self.tend(_TEND_S)
            if self.newest_step > newest:
                newest, deadline = self.newest_step, time.monotonic() + 2 * self._stuck_s
            if time.monotonic() > deadline:
                self._show_stacks()
                raise StuckError(f"the learner did not go on for {2 * self._stuck_s:g} s, nor finish")

    def _wait_for_the_others(self) -> None:
        for process in [*self.actors, *self.sleepers]:
            if process.wait(_EXIT_S) is None:
                self._show_stacks()
                raise StuckError(f"{process.who} still runs {_EXIT_S:g} s after the end")
            self._note_end(process)
            if process in self.actors and process.returncode != 0 and process.who not in self._expected:
                raise StuckError(f"{process.who} ended with {process.returncode}: {process.last_line()}")

    def is_over(self) -> bool:
        """Whether the learner said that the run is finished."""
        with contextlib.closing(self.redis.client()) as client:
            return bool(client.hget(RunKeys(RUN_ID).state, "phase") == b"finished")

    def _spec(self, role: str, *, resume: bool = False) -> ProcessSpec:
        self._started[role] += 1
        who = f"{role}-{self._started[role]}"
        return ProcessSpec(who, self.folder, self.url, resume, self._mutant, self.variant.hmac_key)

    def _processes(self) -> list[Forked]:
        return [*([self.learner] if self.learner else []), *self.actors, *self.sleepers]

    def _tend_once(self) -> None:
        now = time.monotonic()
        due = [action for at, action in self._later if at <= now]
        self._later = [(at, action) for at, action in self._later if at > now]
        for action in due:
            action()
        self._read_steps()
        if self.learner is not None and self.learner.returncode is not None:
            self._replace_learner(self.learner)
        for group in (self.actors, self.sleepers):
            for ended in [each for each in group if each.returncode is not None]:
                group.remove(ended)
                self._note_end(ended)
        while len(self.actors) < NUM_ACTORS and not (self._is_finishing and self.learner is None):
            self.start_actor()
        if now - self._sampled_at > _SAMPLE_S:
            self._sampled_at = now
            self._sample()

    def _replace_learner(self, ended: Forked) -> None:
        is_over = self._is_finishing and ended.returncode == 0 and ended.who not in self._expected
        self._note_end(ended)
        self.learner = None
        if not is_over:
            self.start_learner()

    def _note_end(self, process: Forked) -> None:
        said, is_expected = process.last_line()[:300], process.who in self._expected
        self.ledger.write(
            "ended", process=process.who, returncode=process.returncode, said=said, is_expected=is_expected
        )
        role = process.who.partition("-")[0]
        if process.returncode == -signal.SIGKILL and not process.was_killed:
            lines = (self.folder / f"{process.who}{SUFFIX}").read_bytes().splitlines()
            # Its other threads may have written until the signal came.
            dying = next(line for line in reversed(lines) if b'"dying"' in line)
            self.points[f"{role} {Entry(*json.loads(dying)).fields['point']}"] += 1
        if process.returncode == -signal.SIGKILL or process.returncode == 0 or is_expected:
            return
        self.exits[f"{role} {process.returncode}: {said[:160]}"] += 1

    def _read_steps(self) -> None:
        """Follow the learners' ledgers."""
        for path in self.folder.glob(f"learner-*{SUFFIX}"):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                whole, newline, _ = file.read().rpartition(b"\n")
            if newline:
                self._read[path] = self._read.get(path, 0) + len(whole) + 1
                used = [line for line in whole.split(b"\n") if b'"used"' in line]
                for line in used:
                    self.newest_step = max(self.newest_step, int(line.partition(b'"step":')[2].partition(b",")[0]))

    def _sample(self) -> None:
        self.ledger.write("sampled", place="outbox", bytes=bytes_below(spool_dir(self.folder)))
        self.ledger.write("sampled", place="journal", bytes=bytes_below(output_dir(self.folder) / RUN_ID / "journal"))
        if not self.redis_is_up:
            return
        with contextlib.suppress(redis.RedisError), contextlib.closing(self.redis.client(timeout_s=0.5)) as client:
            counted = client.hget(RunKeys(RUN_ID).state, "bytes")
            self.ledger.write("sampled", place="queue", bytes=int(counted or 0))
            if (held := held_bytes(client)) is not None:
                self.ledger.write("sampled", place="server", bytes=held)

    def _show_stacks(self) -> None:
        """Every living process writes its stacks into its log."""
        for process in self._processes():
            process.send(signal.SIGUSR1)
        time.sleep(0.3)

    def _end_everything(self) -> None:
        self.stop_processes()
        if self.proxy is not None:
            self.proxy.close()
        self.redis_is_up = False
        self.redis.close()
