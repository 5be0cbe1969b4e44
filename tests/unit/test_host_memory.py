"""Pages of freed memory stay with the process."""

import subprocess
import sys

from tests.processes import ROOT

COUNT_FAULTS = """
import resource
from learner.host_memory import keep_freed_memory
{keep}
def churn():
    for _ in range(50):
        blocks = [bytearray(4 << 20) for _ in range(8)]  # all zeros, written wherever pages are not new
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = churn()
print(churn() - before)
"""


def page_faults(keep: str) -> int:
    """Of taking and freeing 1.6 GB in a process of its own, 32 MiB at a time, after as much again to warm up."""
    command = [sys.executable, "-c", COUNT_FAULTS.format(keep=keep)]
    return int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=60).stdout)


def test_freed_memory_is_taken_again_without_page_faults() -> None:
    assert page_faults("keep_freed_memory()") < 1000
    assert page_faults("") > 10_000, "the C library keeps freed memory of itself: keep_freed_memory can go"
