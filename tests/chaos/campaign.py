"""Runs under faults, and what came of them."""

import contextlib
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.endings import bad_endings
from tests.chaos.faults import COMBINED_FAULTS, FAULTS, POINT_FAULTS, PROCESS_FAULTS, lose
from tests.chaos.ledger import read_ledger
from tests.chaos.mutants import MUTANTS
from tests.chaos.profiles import PROFILES, Profile
from tests.chaos.proof import Kind, Violation, check
from tests.chaos.remains import read_remains
from tests.chaos.scene import STUCK_S, Scene, StuckError
from tests.chaos.spec import VARIANTS, Variant

_REDIS_SHARE = 0.4
"""Of the faults, where a profile has any for Redis."""
_GAP_S = (0.05, 0.5)
_WITHOUT_PROGRESS = 0.25
"""Share of the faults that come before anything has recovered from the last one."""

_MUTANT_STUCK_S = 20.0
"""A broken run may well be stuck, and that is not what has to show."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run under faults."""

    profile: str
    seed: int
    faults: Counter[str]
    points: Counter[str]
    """Fault points that killed, by process and name."""
    exits: Counter[str]
    """Processes that ended by themselves, by what they said last."""
    num_steps: int
    num_groups: int
    """Trained in the surviving history."""
    num_discarded: int
    num_stale: int
    """Of them, those that were too old."""
    wall_s: float
    violations: tuple[Violation, ...]

    @property
    def num_faults(self) -> int:
        return self.faults.total() + self.points.total()

    def count(self, kind: Kind) -> int:
        return sum(violation.kind == kind for violation in self.violations)


def run_under_faults(
    folder: Path, profile: Profile, *, seed: int, num_faults: int, variant: Variant = VARIANTS[0]
) -> Outcome:
    """A run from its first step to its end, through ``num_faults`` faults."""
    scene = Scene(folder, profile, seed=seed, variant=variant)
    source = random.Random(f"{profile.name}-{seed}")

    def choose(num_before: int) -> str | None:
        return _choose(profile, source) if num_before < num_faults else None

    return _run(scene, source, choose, lambda: _lose_at_the_end(scene, source))


def run_mutant(folder: Path, name: str, *, seed: int, is_broken: bool = True) -> Outcome:
    """A run of processes that are broken as ``name`` says (or are not), through the faults that bring it to light."""
    mutant = MUTANTS[name]
    broken = name if is_broken else ""
    scene = Scene(
        folder,
        PROFILES[mutant.profile],
        seed=seed,
        num_steps=mutant.num_steps,
        mutant=broken,
        variant=mutant.variant,
        stuck_s=_MUTANT_STUCK_S if is_broken else STUCK_S,
    )
    faults = iter(mutant.faults)
    return _run(scene, random.Random(seed), lambda _: next(faults, None))


def _run(
    scene: Scene,
    source: random.Random,
    choose: Callable[[int], str | None],
    trouble: Callable[[], None] | None = None,
) -> Outcome:
    started = time.monotonic()
    faults: Counter[str] = Counter()
    problems: list[str] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(scene.running())
        try:
            while (name := choose(faults.total() + scene.points.total())) is not None:
                scene.tend(source.uniform(*_GAP_S))
                if source.random() >= _WITHOUT_PROGRESS:
                    scene.wait_for_step()
                scene.ledger.write("fault", name=name, did=FAULTS[name](scene, source))
                faults[name] += name not in POINT_FAULTS  # counted when they kill
            scene.finish(trouble)
        except StuckError as error:
            problems.append(str(error))
            scene.stop_processes()  # what they hold is read while nobody writes
        remains = read_remains(scene.folder, scene.redis, problems, max_uses=scene.variant.max_uses)
    entries = read_ledger(scene.folder)
    violations = [*check(entries, remains, scene.variant.bounds), *bad_endings(entries)]
    return Outcome(
        profile=scene.profile.name,
        seed=scene.seed,
        faults=+faults,
        points=scene.points,
        exits=scene.exits,
        num_steps=len(remains.history),
        num_groups=sum(len(step.groups) for step in remains.history),
        num_discarded=len({e.fields["index"] for e in entries if e.what == "discarded"}),
        num_stale=len({e.fields["index"] for e in entries if e.fields.get("reason") == "stale"}),
        wall_s=time.monotonic() - started,
        violations=tuple(violations),
    )


def _lose_at_the_end(scene: Scene, source: random.Random) -> None:
    """Every other time, if the profile has something against Redis, it goes while the run is finished."""
    if not scene.profile.redis_faults or source.random() < 0.5:
        return
    scene.tend(source.uniform(0.0, 2.0))
    if (learner := scene.learner) is None:
        return
    learner.send(signal.SIGSTOP)  # what Redis holds of a run that is finished nobody keeps for it
    if not scene.is_over():
        scene.ledger.write("fault", name="lose", did=lose(scene, source))
    learner.send(signal.SIGCONT)


def _choose(profile: Profile, source: random.Random) -> str:
    if profile.redis_faults and source.random() < _REDIS_SHARE:
        return source.choice((*profile.redis_faults, *COMBINED_FAULTS))
    return source.choice(list(PROCESS_FAULTS))
