"""samples.jsonl: what the policy wrote, so that progress can be read and not only plotted."""

from collections.abc import Sequence
from pathlib import Path

from lambdapo_async.metrics import JsonLinesLog
from lambdapo_async.rollout import RolloutGroup
from lambdapo_async.tasks.interface import Row


class SampleLog(JsonLinesLog):
    """Appends held-out rollouts, one JSON object per line.

    Args:
        path: created with its folder.
        heldout: the rows that held-out leases index.
        after_step: lines of later steps are cut off, as in metrics.jsonl.
    """

    def __init__(self, path: Path, heldout: Sequence[Row], *, after_step: int) -> None:
        super().__init__(path, after_step=after_step)
        self._heldout = heldout

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
        self.append(sample)
