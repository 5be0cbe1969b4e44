"""What a run has left in its folder, as the report reads it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lambdapo_async.config import RunConfig
from lambdapo_async.durable import explaining_refusal, replace_file
from lambdapo_async.errors import UserError
from lambdapo_async.metrics import JsonLinesTail, MetricRow, read_metrics
from lambdapo_async.report.machine import describe_machine

_METRICS, _SAMPLES, _HEADER = "metrics.jsonl", "samples.jsonl", "run.json"


class RunFolderError(UserError):
    """A folder that holds no run, or that the disk lets nobody write to."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One held-out rollout."""

    step: int
    """Learner step whose evaluation it answered."""
    prompt: str
    text: str
    """The completion."""
    answer: str
    """The reference's final answer."""
    reward: float
    """V"""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """Everything a report is made of."""

    run_id: str
    machine: str
    """Empty when nobody recorded it."""
    config: dict[str, Any]
    """As published; empty when nobody recorded it."""
    rows: list[MetricRow]
    samples: list[Sample]

    @property
    def target(self) -> float | None:
        """Held-out reward that ends the run."""
        target = self.config.get("evaluation", {}).get("target")
        return None if target is None else float(target)


def write_header(folder: Path, run_id: str, config: RunConfig) -> None:
    """Record what metrics do not say: the run's id, config and machine; whole, or as it was before.

    Raises:
        RunFolderError: the disk refused.
    """
    header = {"run_id": run_id, "machine": describe_machine(), "config": config.published()}
    with explaining_refusal(folder / _HEADER, RunFolderError):
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / _HEADER, (json.dumps(header, indent=2) + "\n").encode())


def metrics_path(folder: Path) -> Path:
    """Where a run's metrics are."""
    return folder / _METRICS


def read_run(folder: Path) -> RunRecord:
    """Everything in ``folder``; ``RunFolderError`` when there are no metrics, or one of its files is damaged."""
    rows = read_metrics(metrics_path(folder))
    if not rows:
        raise RunFolderError(f"{folder} holds no run: {_METRICS} is missing or empty; name one like outputs/RUN_ID")
    header = _read_header(folder / _HEADER)
    samples = _read_samples(folder / _SAMPLES)
    return RunRecord(
        run_id=header.get("run_id", folder.name),
        machine=header.get("machine", ""),
        config=header.get("config", {}),
        rows=rows,
        samples=samples,
    )


def recorded_config(folder: Path) -> dict[str, Any]:
    """The config that the run was last started with, as published; empty when nobody recorded it."""
    config: dict[str, Any] = _read_header(folder / _HEADER).get("config", {})
    return config


def _read_samples(path: Path) -> list[Sample]:
    try:
        return [
            Sample(int(line["step"]), line["prompt"], line["text"], line["answer"], float(line["reward"]))
            for line in JsonLinesTail(path).take()
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise RunFolderError(f"{path} is damaged: {error!r}; delete it to report without it") from None


def _read_header(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunFolderError(f"{path} is damaged: {error}; delete it to report without it") from None
    if not isinstance(header, dict) or not isinstance(header.get("config", {}), dict):
        raise RunFolderError(f"{path} is damaged: no object with a config; delete it to report without it")
    return header
