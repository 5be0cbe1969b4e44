"""metrics.jsonl: the history of a run, one JSON object per line.

``{"step": 12, "time": 1764000000.0, "kind": "step", "reward/mean": 0.53, ...}``; ``time`` is Unix seconds, and a
number that is not finite is written as null. Names are slash-grouped and stable: a rename needs a line in CHANGELOG.md.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lambdapo_async.durable import explaining_refusal, replace_file
from lambdapo_async.errors import DiskError

STEP, EVAL, EVENT = "step", "eval", "event"
"""Kinds of rows: one optimizer step; one finished held-out evaluation; a text worth a mark on the curves."""

METRICS: Mapping[str, str] = {
    # kind "step": one row per optimizer step
    "policy_version": "version that the step published",
    "reward/mean": "mean R of every rollout that arrived",
    "reward/verifiable": "mean V of every rollout that arrived",
    "reward/density": "mean semantic density where it was computed",
    "rollout/length": "completion tokens, mean",
    "rollout/truncated": "share of rollouts that hit sampling.max_tokens",
    "advantage/shift": "mean advantage of the trained rollouts",
    "advantage/abs_mean": "mean |advantage| of the trained rollouts",
    "confidence/reward_corr": "correlation of confidence and reward within a group, mean over groups",
    "loss/policy": "policy loss",
    "policy/entropy": "mean entropy of the next token, nats",
    "loss/regularisation": "KL penalty and entropy bonus, weighted; absent without coefficients",
    "kl/reference": "estimated KL(pi || first model), nats per token; absent without objective.kl.coefficient",
    "density/value_corr": "correlation of density and V over the trained rollouts that have a density",
    "optim/grad_norm": "global gradient norm before clipping",
    "optim/lr": "learning rate",
    "optim/skipped": "updates skipped because the gradient was not finite, so far",
    "staleness/mean": "versions between the oldest sampled token of a group and the step, mean over groups",
    "staleness/max": "versions between the oldest sampled token of a group and the step, maximum",
    "staleness/in_flight": "of staleness/mean, what passed while the group was sampled: oldest to newest token",
    "staleness/waiting": "of staleness/mean, what passed in queue and replay: newest token to the step",
    "staleness/share_0": "share of the trained tokens that the step's own version sampled",
    "staleness/share_1": "share of the trained tokens sampled 1 version before the step's",
    "staleness/share_2": "share of the trained tokens sampled 2 versions before the step's",
    "staleness/share_3": "share of the trained tokens sampled 3 versions before the step's",
    "staleness/share_4_7": "share of the trained tokens sampled 4 to 7 versions before the step's",
    "staleness/share_8_up": "share of the trained tokens sampled 8 or more versions before the step's",
    "ratio/ess_token": "effective sample size of the token ratios, share of the tokens",
    "ratio/ess_sequence": "effective sample size of the sequence ratios, share of the sequences",
    "ratio/log_mean": "mean log pi - log mu, nats; negative where the policy left what was sampled",
    "ratio/abs_log_mean": "mean |log pi - log mu|, nats",
    "ratio/abs_log_max": "largest |log pi - log mu|, nats",
    "ratio/clipped_pos": "share of tokens with advantage > 0 whose surrogate ratio was clipped",
    "ratio/clipped_neg": "share of tokens with advantage < 0 whose surrogate ratio was clipped",
    "ratio/truncated_pos": "share of tokens with advantage > 0 whose importance weight was truncated",
    "ratio/truncated_neg": "share of tokens with advantage < 0 whose importance weight was truncated",
    "ratio/masked_pos": "share of tokens with advantage > 0 whose importance weight was set to 0",
    "ratio/masked_neg": "share of tokens with advantage < 0 whose importance weight was set to 0",
    "ratio/rejected_pos": "share of tokens with advantage > 0 that a filter rejected",
    "ratio/rejected_neg": "share of tokens with advantage < 0 that a filter rejected",
    "mismatch_kl": "k3 estimate of KL(mu || pi), nats per token",
    "mismatch/fresh": "mean |log pi - log mu| of tokens whose version and context are the step's, nats, at its start",
    "mismatch/fresh_share": "share of the step's tokens that mismatch/fresh is taken over",
    "alarm/ess_token": "1 while the token ratios' effective sample size is below 0.3",
    "alarm/ess_sequence": "1 while the sequence ratios' effective sample size is below 0.3",
    "alarm/masked": "1 while more than 10 % of the tokens are masked or rejected",
    "alarm/negative_shift": "1 while the mean advantage is below 0 and groups are stale",
    "alarm/density_not_value": "1 while density rises over 20 steps and the verifiable reward does not",
    "queue/groups": "groups in Redis that the learner has not journaled yet",
    "queue/bytes": "payload bytes in Redis",
    "queue/leased": "prompts held by actors",
    "queue/admitted": "prompts granted and not consumed yet",
    "queue/full": "offers that found no room and were repeated, since this Redis was empty",
    "queue/late": "groups refused because another actor held or had answered their prompt, since this Redis was empty",
    "queue/expired": "leases that were not renewed in time and went to others, since this Redis was empty",
    "groups/trained": "groups trained, so far",
    "groups/zero_variance": "groups left out because all rewards were equal, so far",
    "groups/dropped_stale": "groups dropped above staleness.drop_above, so far",
    "groups/evicted": "groups that made room in the replay queue, so far",
    "groups/too_large": "groups larger than replay.max_bytes, so far",
    "groups/duplicate": "answers to prompts that were answered before, so far; nothing was trained on them",
    "groups/quarantined": "groups kept aside because their actor was, so far",
    "groups/malformed": "groups quarantined, so far",
    "groups/without_confidence": "rollouts of the step that took their group's mean confidence",
    "frac_reward_zero_std": "share of the groups that arrived whose rewards were all equal",
    "replay/groups": "groups in the replay queue behind the step",
    "replay/bytes": "payload bytes of the groups in the replay queue",
    "replay/rate_error": "samples owed (> 0) or ahead (< 0) of replay.samples_per_insert; 0 without it",
    "bias/length_ratio": "mean length of trained groups over that of generated ones, so far; below 1 long ones starve",
    "bias/difficulty_gap": "mean 1 - V of trained minus that of generated groups, so far; below 0 hard ones starve",
    "tokens/trained": "completion tokens of the step",
    "speed/tokens_per_s": "completion tokens trained per second, waiting included",
    "speed/sequences_per_s": "rollouts trained per second, waiting included",
    "speed/mfu": "share of the GPU's peak FLOP/s that the step's training reached; absent where the peak is not known",
    "speed/idle_share": "share of the step's time in which the learner waited for groups",
    "time/step_s": "seconds from batch to recorded step",
    "time/wait_s": "seconds waited for groups",
    "time/publish_stall_s": "seconds in which the step waited for the previous publish",
    "weights/bytes": "bytes published with the version before, all its files",
    "weights/keyframe": "1 if that version was published whole, else 0",
    "weights/union": "1 if a union file went with it, else 0",
    "weights/changed": "share of its elements that differ from the version before it; 1 without a base",
    "weights/encode_s": "seconds to compare, encode and compress it",
    "weights/publish_s": "seconds to write it to the store",
    "actors/alive": "actors with a live heartbeat",
    "actors/tokens_per_s": "completion tokens sampled per second, all actors",
    "actors/idle_share": "share of the last ten seconds in which an actor's engine held no request, mean",
    "actors/mismatch_max": "largest k3 estimate of KL(mu || pi) of an actor at staleness 0, nats per token",
    "actors/mismatch_median": "the median over the actors",
    "actors/acceptance_min": "smallest share of an actor's groups that was trained",
    "actors/truncated_max": "largest share of an actor's rollouts that hit sampling.max_tokens",
    "actors/quarantined": "actors set aside now, because their log-probabilities are not the learner's",
    "actors/quarantines": "times an actor was set aside, since the learner started",
    "actors/readmitted": "times an actor was taken back after a passed canary, since the learner started",
    # kind "eval": one row per finished evaluation; its step is the one that asked
    "eval/reward": "mean V on the held-out prompts",
    "eval/num": "held-out prompts answered",
    "eval/length": "completion tokens, mean",
    "eval/version": "policy version that answered, mean over tokens",
    # kind "event"
    "text": "what happened",
}
"""Name -> meaning. Beside these ``reward/<name>`` of each reward function, and ``bias/<reason>_upto_<tokens>``: groups
never trained on so far, by why and by their longest completion in powers of two."""


@dataclass(frozen=True, slots=True)
class MetricRow:
    """One line of metrics.jsonl."""

    kind: str
    step: int
    """Optimizer steps finished when it was written."""
    time: float
    """Unix seconds."""
    values: Mapping[str, float]
    """Numbers by name; NaN where the file has null."""
    text: str = ""
    """What happened, in an ``event``."""


class JsonLinesLog:
    """Appends JSON objects with a ``step``, each in one write, so that a crash tears the last line at most.

    Args:
        path: created with its folder.
        after_step: lines of later steps are cut off, as is a torn last line: the history of a resumed run goes on
            where its checkpoint stands. None leaves the file as it is, for a second writer.

    Raises:
        DiskError: the disk refused, now or at a later line.
    """

    def __init__(self, path: Path, *, after_step: int | None = None) -> None:
        self._path = path
        with explaining_refusal(path, DiskError):
            path.parent.mkdir(parents=True, exist_ok=True)
            if after_step is not None and path.exists():
                truncate_after(path, after_step)
            self._file = path.open("ab", buffering=0)

    def append(self, fields: Mapping[str, object]) -> None:
        """Write one line; numbers must be finite."""
        rest = json.dumps(fields, allow_nan=False).encode() + b"\n"
        with explaining_refusal(self._path, DiskError):
            while rest:  # a disk that fills up takes a part, and refuses the next
                rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        """Close the file; idempotent."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class MetricsLog(JsonLinesLog):
    """Appends rows of metrics."""

    def write(self, kind: str, step: int, values: Mapping[str, float | str]) -> None:
        """Append one row."""
        row = {"step": step, "time": round(time.time(), 3), "kind": kind}
        self.append({**row, **{name: _plain(value) for name, value in values.items()}})


def truncate_after(path: Path, step: int) -> None:
    """Cut the lines of later steps and torn ones from a file of JSON lines with a ``step``, whole or not at all."""
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if (row := _parse(line)) is not None and row["step"] <= step]
    if kept == lines:
        return
    replace_file(path, b"".join(kept))


class MetricsTail:
    """Rows as they are appended to a file that may not exist yet."""

    def __init__(self, path: Path) -> None:
        self._lines = JsonLinesTail(path)

    def take(self) -> list[MetricRow]:
        """Rows since the last call; objects that are no rows are skipped."""
        return [_row_of(fields) for fields in self._lines.take() if _is_row(fields)]


class JsonLinesTail:
    """JSON objects as another process appends them, one per line; the file may not exist yet."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def take(self) -> list[dict[str, Any]]:
        """Objects whose lines are complete and were not returned before; a line that is no object is skipped."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                complete = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return []
        self._offset += len(complete[0]) + len(complete[1])
        return [fields for line in complete[0].splitlines() if (fields := _object(line)) is not None]


def read_metrics(path: Path) -> list[MetricRow]:
    """All rows of a file, in order; a torn last line is left out, and no file is no rows."""
    return MetricsTail(path).take()


def _is_row(fields: Mapping[str, Any]) -> bool:
    return isinstance(fields.get("step"), int) and isinstance(fields.get("time"), float | int) and "kind" in fields


def _row_of(fields: Mapping[str, Any]) -> MetricRow:
    numbers = {
        name: math.nan if value is None else float(value)
        for name, value in fields.items()
        if name not in ("step", "time", "kind") and (value is None or isinstance(value, int | float))
    }
    text = fields.get("text", "")
    return MetricRow(str(fields["kind"]), int(fields["step"]), float(fields["time"]), numbers, str(text))


def series(rows: Sequence[MetricRow], kind: str, name: str) -> Iterator[tuple[MetricRow, float]]:
    """The finite values of one metric, with their rows."""
    for row in rows:
        if row.kind == kind and math.isfinite(value := row.values.get(name, math.nan)):
            yield row, value


def _parse(line: bytes) -> dict[str, Any] | None:
    """A complete line with a step; None for a torn one."""
    fields = _object(line) if line.endswith(b"\n") else None
    return fields if fields is not None and isinstance(fields.get("step"), int) else None


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        fields = json.loads(line)
    except ValueError:
        return None
    return fields if isinstance(fields, dict) else None


def _plain(value: float | str) -> float | str | None:
    """A JSON value: JSON has no NaN and no infinity."""
    if isinstance(value, str | int):
        return value
    return float(value) if math.isfinite(value) else None
