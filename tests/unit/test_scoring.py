"""The scorer: real worker process, real deadline."""

import asyncio
import os
import signal
from pathlib import Path

import psutil
import pytest

from actors.scoring import Scorer
from lambdapo_async.config import RunConfig
from lambdapo_async.errors import TaskError
from lambdapo_async.tasks.interface import Row

ROW = Row(prompt="1+1=", answer="2", solution=None)


def config_with(reward: str, tmp_path: Path, *, timeout_s: float = 60.0) -> RunConfig:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1+1=", "answer": "2"}\n')
    return RunConfig.model_validate(
        {
            "model": {"path": "starter"},
            "task": {"kind": "jsonl", "train_path": str(rows), "heldout_path": str(rows), "rewards": [reward]},
            "actor": {"reward_timeout_s": timeout_s},
        }
    )


def hang(row: Row, completions: list[str]) -> list[float]:
    if "hang" in completions:
        signal.pause()
    return [1.0] * len(completions)


def worker_pid(row: Row, completions: list[str]) -> list[float]:
    Path(completions[0]).write_text(str(os.getpid()))
    return [0.0] * len(completions)


def broken(row: Row, completions: list[str]) -> list[float]:
    return [2.0]


async def test_scores_come_from_another_process(tmp_path: Path) -> None:
    scorer = Scorer(config_with(f"{__name__}:worker_pid", tmp_path))
    try:
        scores = await scorer.score(ROW, [str(tmp_path / "pid"), "x"])
        pid = int((tmp_path / "pid").read_text())
        assert [score.parts["verifiable"] for score in scores] == [0.0, 0.0]
        assert pid != os.getpid()
        worker = psutil.Process(pid)
    finally:
        scorer.close()
    assert not worker.is_running()


async def test_a_hanging_reward_scores_zero_and_harms_nobody_else(tmp_path: Path) -> None:
    scorer = Scorer(config_with(f"{__name__}:hang", tmp_path, timeout_s=10.0))
    try:
        assert (await scorer.score(ROW, ["fine"]))[0].reward == 1.0
        hung, *others = await asyncio.gather(
            scorer.score(ROW, ["hang", "fine"]), *(scorer.score(ROW, ["fine"]) for _ in range(3))
        )
        assert [score.reward for score in hung] == [0.0, 0.0]
        assert [score.reward for scores in others for score in scores] == [1.0, 1.0, 1.0]
        assert scorer.failures == 1
    finally:
        scorer.close()


async def test_a_broken_reward_is_an_error(tmp_path: Path) -> None:
    scorer = Scorer(config_with(f"{__name__}:broken", tmp_path))
    try:
        with pytest.raises(TaskError, match="broken"):
            await scorer.score(ROW, ["a", "b"])
    finally:
        scorer.close()
