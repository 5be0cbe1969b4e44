"""kill -9 of a real learner on a real Redis, at seven named points in one run; and of a learner of two ranks."""

import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from redis import Redis

from lambdapo_async.cli.errors import USER_ERROR_STATUS
from lambdapo_async.config import RunConfig
from lambdapo_async.journal.records import VersionRecord
from learner.character_tokenizer import build_tokenizer
from learner.crew_member import run_member
from learner.parallel import Ranks
from learner.replay import Recording, replay_on
from tests.dying_learner import PLACES
from tests.fakes_broker import FakeRun
from tests.learner_stage import Stage, journal_of, stage_config, trained_in
from tests.learner_stage import acting as acting_in_memory
from tests.processes import Process, wait_until
from tests.ranks import run_ranks
from tests.resumed_run import assert_same_bits, losses
from tests.scripted_run import CONFIG_FILE, acting, settings
from tests.tiny_models import tiny_model, tiny_model_folder

LIFE_S = 120.0
NUM_STEPS = 12


@dataclass(frozen=True)
class Scene:
    """A run on a real Redis, of which each process is one life of its learner."""

    root: Path
    redis_url: str
    run_id: str

    @property
    def folder(self) -> Path:
        return self.root / self.run_id

    @contextmanager
    def learner(self, log: str, *flags: str, dies_at: str | None = None, call: int = 2) -> Iterator[Process]:
        changes = [f"output_dir={self.root}", f"learner.num_steps={NUM_STEPS}", "learner.checkpoint_every=3"]
        settings = [part for change in [*changes, "learner.record=true"] for part in ("--set", change)]
        module = ["learner"] if dies_at is None else ["tests.dying_learner", dies_at, str(call)]
        place = ["--redis-url", self.redis_url, "--run-id", self.run_id]
        process = Process(*module, str(self.root / "run.toml"), *place, *settings, *flags, log=self.root / log)
        try:
            yield process
        finally:
            process.kill()

    def replay(self) -> Path:
        again = Process("lambdapo_async.cli.app", "replay", str(self.folder), log=self.root / "replay.log")
        try:
            assert again.wait(timeout_s=LIFE_S) == 0, again.log_tail()
        finally:
            again.kill()
        return self.root / f"{self.run_id}-replay"

    def assert_every_prompt_once(self) -> None:
        uses = Counter(trained_in(self.folder))
        assert (len(uses), max(uses.values())) == (2 * NUM_STEPS, 1)
        versions = [record.version for _, record in journal_of(self.folder) if isinstance(record, VersionRecord)]
        assert versions == sorted(set(versions))


@pytest.fixture
def scene(tmp_path: Path, redis_url: str, request: pytest.FixtureRequest) -> Iterator[Scene]:
    tokenizer = build_tokenizer(64)
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "run.toml").write_text(CONFIG_FILE.format(model=tmp_path / "model"))
    scene = Scene(tmp_path, redis_url, request.node.name[:40])
    with acting(redis_url, scene.run_id, settings(rollout={"groups_per_step": 2})):
        yield scene


@pytest.mark.system
@pytest.mark.timeout(600)
def test_a_learner_killed_at_every_named_point_ends_as_if_it_had_lived(scene: Scene) -> None:
    # The second call of each: every life gets at least one step further than the one before.
    for number, place in enumerate(PLACES):
        with scene.learner(f"{number}.log", *(["--resume"] if number else []), dies_at=place) as process:
            assert process.wait(timeout_s=LIFE_S) == -signal.SIGKILL, f"{place}: {process.log_tail()}"
    with scene.learner("last.log", "--resume") as process:
        assert process.wait(timeout_s=LIFE_S) == 0, process.log_tail()
    scene.assert_every_prompt_once()
    assert_same_bits(scene.folder, scene.replay(), num_steps=NUM_STEPS)


@pytest.mark.system
@pytest.mark.timeout(300)
def test_a_learner_killed_before_its_first_checkpoint_is_started_anew(scene: Scene) -> None:
    """Nothing was published, so that nobody has sampled for it."""
    with scene.learner("killed.log", dies_at="checkpoint half written", call=1) as process:
        assert process.wait(timeout_s=LIFE_S) == -signal.SIGKILL, process.log_tail()
    with scene.learner("resumed.log", "--resume") as process:
        assert process.wait(timeout_s=LIFE_S) == USER_ERROR_STATUS, process.log_tail()
    assert (scene.root / "resumed.log").read_text() == (
        f"error: --resume: {scene.folder} holds no checkpoint; its learner ended before it had written the first one, "
        "so nothing is lost: start it without --resume\n"
    )
    with scene.learner("anew.log") as process:
        assert process.wait(timeout_s=LIFE_S) == 0, process.log_tail()
    scene.assert_every_prompt_once()


@pytest.mark.system
@pytest.mark.timeout(300)
def test_a_redis_that_forgot_everything_is_told_again(scene: Scene) -> None:
    with scene.learner("learner.log") as process, Redis.from_url(scene.redis_url) as client:
        for step in (3, 7):
            wait_until(
                lambda step=step: len(losses(scene.folder)) >= step, f"step {step}", timeout_s=LIFE_S, alive=process
            )
            client.flushall()
        assert process.wait(timeout_s=LIFE_S) == 0, process.log_tail()
    assert "Redis agrees with this learner's journal again" in (scene.root / "learner.log").read_text()
    scene.assert_every_prompt_once()
    assert_same_bits(scene.folder, scene.replay(), num_steps=NUM_STEPS)


class Crash(Exception):  # noqa: N818
    """Rank 0 dies here; the others are sent home, for a test wants them back."""


def _dying(stage: Stage, at_call: int) -> None:
    train, left = stage.parts.stepper.train, [at_call]

    def train_or_die(batch):
        left[0] -= 1
        if left[0] == 0:
            stage.kill()
            raise Crash
        return train(batch)

    stage.parts.stepper.train = train_or_die


def _two_lives(ranks: Ranks, folder: Path, config: RunConfig) -> None:
    if not ranks.is_main:
        run_member(config, ranks)  # until rank 0 dies
        run_member(config, ranks)
        return
    run = FakeRun("run")
    with acting_in_memory(run, config):
        first = Stage(run, folder, config, ranks)
        _dying(first, 4)
        with pytest.raises(Crash), first.resources:
            first.learner.run()
        first.parts.stepper.crew.finish()
        second = Stage(run, folder, config, ranks)
        with second.resources:
            second.learner.run()


def _uninterrupted(ranks: Ranks, folder: Path, config: RunConfig) -> None:
    if ranks.is_main:
        replay_on(ranks, Recording.open(folder), folder / "replay")
    else:
        run_member(config, ranks)


@pytest.mark.timeout(300)
def test_two_ranks_take_the_journal_s_steps_again(tmp_path: Path) -> None:
    model = tiny_model_folder(tmp_path / "model")
    config = stage_config(model={"path": str(model)}, learner={"num_threads": 1})
    for name, function in (("lives", _two_lives), ("replay", _uninterrupted)):
        (tmp_path / f"{name}-results").mkdir()
        run_ranks(tmp_path / f"{name}-results", 2, function, tmp_path, config, deadline_s=120.0)
    assert_same_bits(tmp_path, tmp_path / "replay", num_steps=6)
