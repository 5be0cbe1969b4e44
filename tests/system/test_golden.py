"""A refactor leaves 20 steps of the CPU recipe as they were, to the bit.

``python -m tests.system.test_golden`` writes the file anew, after a change that is meant to change numbers.
"""

import json
import platform
from pathlib import Path

import pytest

from tests.golden_run import run_portably, versions

GOLDEN = Path(__file__).parent / "golden_20_steps.json"
REGENERATE = "if that was intended, run `python -m tests.system.test_golden` and commit the file with the reason"


@pytest.mark.system
@pytest.mark.skipif(platform.machine() != "x86_64", reason="recorded on x86_64; other CPUs round differently")
def test_20_steps_are_those_on_record() -> None:
    golden = json.loads(GOLDEN.read_text())
    for package, version in versions().items():
        if golden[package] != version:
            pytest.skip(f"recorded with {package} {golden[package]}, this is {version}")
    found = run_portably()
    steps = enumerate(zip(golden["steps"], found["steps"], strict=True), start=1)
    changed = [f"step {step}: {before} became {now}" for step, (before, now) in steps if before != now]
    assert not changed, f"{len(changed)} steps differ, first {changed[0]}; {REGENERATE}"
    assert found["weights_sha256"] == golden["weights_sha256"], f"the weights after the last step differ; {REGENERATE}"


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(run_portably(), indent=1) + "\n")
