"""Checkpoints: whole or not at all, and never written by a learner that lost the run.

checkpoints/fence-3                        won by the third learner (learner.fence)
checkpoints/step-00000040.fence-3.save-2/  complete, for it got its name by a rename
    model/              float32 weights, config and tokenizer: AutoModelForCausalLM.from_pretrained reads it
    optimizer/          AdamW's moments in slices, one set of files per rank (learner.moments)
    random.safetensors  random state of rank 0; the other ranks draw nothing
    state.json          counters, receipts, replay queue, the rest of the random state
    manifest.json       file -> bytes and xxh3_128 (learner.manifest)

With several ranks all write into the same partial folder, on storage that they share; rank 0 alone holds the fence,
and gives the folder its name once every rank has written. Any number of ranks resumes.
"""

import logging
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lambdapo_async.durable import sync, sync_tree, whole_or_gone
from lambdapo_async.errors import CheckpointError
from lambdapo_async.journal.history import History
from lambdapo_async.journal.receipts import ReceiptsState
from learner.crew import Crew
from learner.fence import check_owner, take_fence, unless_fenced
from learner.manifest import MANIFEST, check_manifest, write_manifest
from learner.moments import read_moments, write_moments
from learner.parallel import ALONE, Ranks
from learner.pool import PoolState
from learner.rng import RandomState
from learner.shared_folders import delete_folder, give_name

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d+)\.fence-(\d+)\.save-(\d+)")


class LearnerState(BaseModel):
    """Where a learner stands, beside its policy."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: NonNegativeInt
    """Optimizer steps taken."""
    version: int = Field(ge=-1)
    """Newest policy version that was claimed; -1 before the first."""
    receipts: ReceiptsState = ReceiptsState()
    """What was journaled; the journal may hold more."""
    journaled: NonNegativeInt = 0
    """Number of the journal's last record at that time: nothing behind it is in this state."""
    pool: PoolState = PoolState()
    """What was made of it."""
    open_rounds: tuple[NonNegativeInt, ...] = ()
    """Steps whose evaluations wait for answers."""


class Saveable(Protocol):
    """What a checkpoint takes from the learner's ``Policy``; every rank calls every method."""

    num_updates: int
    num_skipped: int

    def save_model(self, folder: Path) -> None:
        """Write a Hugging Face folder, on rank 0."""

    def optimizer_state(self) -> dict[str, Tensor]:
        """``moment:parameter`` -> tensor, or this rank's slice, of what the optimizer remembers."""


class Restorable(Protocol):
    """What a checkpoint gives back to the learner's ``Policy``."""

    def named_masters(self) -> Iterator[tuple[str, Tensor]]:
        """Name and master of every parameter, sliced as its moments are to be."""

    def load_optimizer_state(self, moments: Mapping[str, Tensor], *, num_updates: int, num_skipped: int) -> None:
        """Go on from what :meth:`Saveable.optimizer_state` said."""


class _SavedState(BaseModel):
    """state.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    learner: LearnerState
    num_updates: NonNegativeInt
    num_skipped: NonNegativeInt
    python_rng: list[object]
    numpy_rng: dict[str, object]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that was read and found whole."""

    folder: Path
    state: LearnerState
    _saved: _SavedState

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read it without a proof that it is whole: for ranks that rank 0 tells which one it verified.

        Raises:
            CheckpointError: it cannot be read.
        """
        try:
            saved = _SavedState.model_validate_json((folder / "state.json").read_bytes())
        except (OSError, ValidationError) as error:
            raise CheckpointError(f"checkpoint {folder} cannot be read: {error!s:.300}") from error
        return cls(folder, saved.learner, saved)

    @property
    def model_dir(self) -> Path:
        """For ``Policy.load``."""
        return self.folder / "model"

    def restore(self, policy: Restorable, ranks: Ranks = ALONE) -> None:
        """On all ranks: give ``policy``, loaded from :attr:`model_dir`, its moments; rank 0 its random state."""
        moments = read_moments(self.folder / "optimizer", dict(policy.named_masters()), ranks)
        policy.load_optimizer_state(moments, num_updates=self._saved.num_updates, num_skipped=self._saved.num_skipped)
        if ranks.is_main:
            tensors = load_file(self.folder / "random.safetensors")
            RandomState(tensors, self._saved.python_rng, self._saved.numpy_rng).restore()


class CheckpointStore:
    """The checkpoints of one run in one folder, in the hands of rank 0. Take the fence before anything is loaded."""

    def __init__(self, folder: Path, ranks: Ranks = ALONE) -> None:
        self._folder = folder
        self._crew = Crew(ranks)
        self._fence: int | None = None
        self._num_saves = 0
        self._refused: set[Path] = set()

    def take_fence(self) -> int:
        """Own the run; an earlier learner can neither save nor prune any more."""
        self._fence = take_fence(self._folder)
        return self._fence

    def save(self, state: LearnerState, policy: Saveable) -> Path:
        """Write a checkpoint durably; it appears under its name complete, or not at all.

        Raises:
            FencedError: a later learner owns the run.
            CheckpointError: the disk refused; nothing is left of it, and the earlier checkpoints stay.
        """
        fence = self._owned()
        self._num_saves += 1
        name = f"step-{state.step:08d}.fence-{fence}.save-{self._num_saves}"
        partial, final = self._folder / f"partial-{name}", self._folder / name
        with whole_or_gone(partial, final):
            with unless_fenced(self._folder, fence):
                partial.mkdir(parents=True)
                self._crew.save(partial)
                write_share(partial, policy, self._crew.ranks)
                _write_rest(partial, state, policy)
                sync_tree(partial)
            self._owned()  # a learner that slept while it wrote must not come up with a newer checkpoint
            with unless_fenced(self._folder, fence):
                give_name(partial, final, last_file=MANIFEST)
            sync(self._folder)
        return final

    def load_latest(self, history: History | None = None) -> Checkpoint | None:
        """The newest checkpoint; None when there is none.

        Instead of a damaged one, or one that is no part of ``history``, the next older one is taken, with a warning:
        the journal leads from there to the same steps.

        Args:
            history: of the journal, once nothing that an older learner appends counts any more; None for those who
                want the model and do not go on.

        Raises:
            CheckpointError: there are checkpoints, but none can be used.
        """
        problems = []
        for folder in self._newest_first():
            try:
                return _read(folder, history)
            except CheckpointError as error:
                logger.warning("%s; looking for an older checkpoint", error)
                problems.append(str(error))
                self._refused.add(folder)
        if problems:
            raise CheckpointError(f"no checkpoint in {self._folder} can be used: {'; '.join(problems)}")
        return None

    def prune(self, keep: int) -> float:
        """Delete all but the ``keep`` newest, what :meth:`load_latest` refused and what was left half written.

        What cannot be deleted yet is left to the next call, with a warning.

        Returns:
            The first journal record that one of those left needs.
        """
        fence = self._owned()
        found = [(_NAME.fullmatch(path.name[len("partial-") :]), path) for path in self._folder.glob("partial-*")]
        # Not a later learner's: one may have come since we looked, and be writing.
        partial = [path for match, path in found if match and int(match[2]) <= fence]
        found_whole = self._newest_first()
        kept = [folder for folder in found_whole if folder not in self._refused][: max(1, keep)]
        for folder in [*partial, *(folder for folder in found_whole if folder not in kept)]:
            delete_folder(folder)
        return min(_keep_from(folder) for folder in kept)

    def check_owner(self) -> None:
        """``FencedError`` once a later learner took over."""
        self._owned()

    def _owned(self) -> int:
        if self._fence is None:
            raise CheckpointError(f"{self._folder}: take_fence() before anything is written")
        check_owner(self._folder, self._fence)
        return self._fence

    def _newest_first(self) -> list[Path]:
        """By fence first: what a fenced-off learner wrote late is older than anything its successor wrote."""
        if not self._folder.is_dir():
            return []
        found = [(match, path) for path in self._folder.iterdir() if (match := _NAME.fullmatch(path.name))]
        return [path for _, path in sorted(found, key=lambda item: _age(item[0]), reverse=True)]


def _keep_from(folder: Path) -> float:
    """First journal record that a checkpoint needs; infinity for one that nobody can resume from."""
    try:
        return Checkpoint.open(folder).state.pool.keep_from
    except CheckpointError as error:
        logger.warning("%s", error)
        return math.inf


def _age(name: re.Match[str]) -> tuple[int, int, int]:
    step, fence, save = (int(number) for number in name.groups())
    return fence, step, save


def write_share(folder: Path, policy: Saveable, ranks: Ranks) -> None:
    """On all ranks: write this rank's part; returns when every rank has written.

    Raises:
        CheckpointError: this rank does not see ``folder``; on every rank, when one could not write its moments.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"rank {ranks.rank} does not see {folder}, which rank 0 made: put output_dir on storage that all share"
        )
    (folder / "model").mkdir(exist_ok=True)
    policy.save_model(folder / "model")
    write_moments(folder / "optimizer", policy.optimizer_state(), ranks)
    ranks.wait_for_all()


def _write_rest(folder: Path, state: LearnerState, policy: Saveable) -> None:
    random_state = RandomState.capture()
    saved = _SavedState(
        learner=state,
        num_updates=policy.num_updates,
        num_skipped=policy.num_skipped,
        python_rng=random_state.python,
        numpy_rng=random_state.numpy,
    )
    (folder / "state.json").write_text(saved.model_dump_json())
    save_file(random_state.tensors, folder / "random.safetensors")
    write_manifest(folder)


def _read(folder: Path, history: History | None) -> Checkpoint:
    check_manifest(folder)
    checkpoint = Checkpoint.open(folder)
    if history is not None:
        _check_counted(checkpoint, history)
    return checkpoint


def _check_counted(checkpoint: Checkpoint, history: History) -> None:
    """A learner that lost the run, but was shown an old listing, saves what its successors do not know of."""
    name = _NAME.fullmatch(checkpoint.folder.name)
    fence = int(name[2]) if name else 0
    end, journaled = history.end_of(fence), checkpoint.state.journaled
    if journaled >= end:
        raise CheckpointError(
            f"checkpoint {checkpoint.folder} goes up to journal record {journaled}, but of fence {fence} only those up "
            f"to {end - 1} count: it was saved after fence {fence} had lost the run, or the journal is an older copy"
        )
