"""`scripts/chaos`: long campaigns of faults, and their result as JSON."""

import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, get_args

import typer

from benchmarks.machine import describe_machine
from tests.chaos.campaign import Outcome, run_under_faults
from tests.chaos.folders import scene_folder, sockets
from tests.chaos.profiles import PROFILES
from tests.chaos.proof import Kind
from tests.chaos.spec import VARIANTS

_FAULTS_PER_RUN = 40
RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "chaos.json"


def main(
    faults: Annotated[int, typer.Option(help="Faults altogether.")] = 200,
    seed: Annotated[int, typer.Option(help="Decides every fault; its instant is the machine's.")] = 0,
    profile: Annotated[str, typer.Option(help=f"all, or some of {', '.join(PROFILES)}.")] = "all",
    output: Annotated[Path, typer.Option(help="Where the result goes.")] = RESULT,
) -> None:
    """Break a run again and again, and prove from the ledgers that it kept its promises."""
    names = list(PROFILES) if profile == "all" else profile.split(",")
    if unknown := [name for name in names if name not in PROFILES]:
        raise typer.BadParameter(f"{unknown[0]} is no profile: take {', '.join(PROFILES)}")
    machine = describe_machine()  # before the first result makes the commit a dirty one
    outcomes: list[Outcome] = []
    while (left := faults - sum(outcome.num_faults for outcome in outcomes)) > 0:
        number = len(outcomes)
        outcomes.append(_run(names[number % len(names)], seed + number, min(left, _FAULTS_PER_RUN), number))
        _say(outcomes[-1], faults - left, faults)
        output.write_text(json.dumps({"machine": machine, **summary(outcomes, seed)}, indent=1) + "\n")
    sys.exit(1 if any(outcome.violations for outcome in outcomes) else 0)


def _run(profile: str, seed: int, faults: int, number: int) -> Outcome:
    with scene_folder(f"{profile}-{seed}") as folder:
        outcome = run_under_faults(
            folder,
            PROFILES[profile],
            seed=seed,
            num_faults=faults,
            variant=VARIANTS[number // 2 % len(VARIANTS)],
        )
        if outcome.violations:
            shutil.copytree(folder, Path("outputs") / f"chaos-{profile}-{seed}", dirs_exist_ok=True, ignore=sockets)
    return outcome


def _say(outcome: Outcome, before: int, wanted: int) -> None:
    print(
        f"{before + outcome.num_faults:5d} of {wanted} faults: {outcome.profile} seed {outcome.seed}, "
        f"{outcome.num_steps} steps, {outcome.num_groups} groups, {outcome.wall_s:.0f} s, "
        f"{len(outcome.violations)} violations",
        flush=True,
    )
    for violation in outcome.violations[:10]:
        print(f"      {violation.kind}: {violation.detail}", flush=True)


def summary(outcomes: Sequence[Outcome], seed: int) -> dict[str, object]:
    """What the campaign showed, as JSON."""
    profiles = sorted({outcome.profile for outcome in outcomes}, key=list(PROFILES).index)
    return {
        "seed": seed,
        "total": _totals(outcomes),
        "profiles": {name: _totals([each for each in outcomes if each.profile == name]) for name in profiles},
        "violations": [
            {"profile": outcome.profile, "seed": outcome.seed, **asdict(violation)}
            for outcome in outcomes
            for violation in outcome.violations
        ],
    }


def _totals(outcomes: Sequence[Outcome]) -> dict[str, object]:
    faults: Counter[str] = Counter()
    points: Counter[str] = Counter()
    exits: Counter[str] = Counter()
    for outcome in outcomes:
        faults, points, exits = faults + outcome.faults, points + outcome.points, exits + outcome.exits
    return {
        "runs": len(outcomes),
        "faults": faults.total() + points.total(),
        "faults_by_kind": dict(sorted(faults.items())) | {"fault_point": points.total()},
        "fault_points": len(points),
        "steps": sum(outcome.num_steps for outcome in outcomes),
        "groups": sum(outcome.num_groups for outcome in outcomes),
        "discarded": sum(outcome.num_discarded for outcome in outcomes),
        **{kind: sum(outcome.count(kind) for outcome in outcomes) for kind in get_args(Kind)},
        "ended_by_themselves": dict(exits.most_common(12)),
        "wall_s": round(sum(outcome.wall_s for outcome in outcomes), 1),
        "finished_at": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


if __name__ == "__main__":
    typer.run(main)
