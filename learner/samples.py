"""samples.jsonl: what the policy wrote, so that progress can be read and not only plotted."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from lambdapo_async.metrics import truncate_after
from lambdapo_async.rollout import RolloutGroup
from lambdapo_async.tasks.interface import Row


class SampleLog:
    """Appends held-out rollouts, one JSON object per line.

    Args:
        path: created with its folder.
        heldout: the rows that held-out leases index.
        after_step: lines of later steps are cut off, as in metrics.jsonl.
    """

    def __init__(self, path: Path, heldout: Sequence[Row], *, after_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            truncate_after(path, after_step)
        self._heldout = heldout
        self._file = path.open("ab", buffering=0)

    def write(self, step: int, group: RolloutGroup) -> None:
        """Append the first rollout of a held-out group, answered for the evaluation of ``step``."""
        row, rollout = self._heldout[group.lease.index], group.rollouts[0]
        sample = {
            "step": step,
            "split": group.lease.split,
            "prompt": row.prompt,
            "text": rollout.text,
            "answer": row.answer,
            "reward": rollout.reward_parts["verifiable"],
        }
        self._file.write(json.dumps(sample).encode() + b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
