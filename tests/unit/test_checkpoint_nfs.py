"""Checkpoints and fences on storage that answers as NFS may."""

import errno
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lambdapo_async.errors import CheckpointError, FencedError
from lambdapo_async.journal.history import History
from lambdapo_async.journal.journal import Journal
from lambdapo_async.journal.records import VersionRecord
from learner.checkpoint import CheckpointStore, LearnerState
from learner.fence import check_owner, newest_fence, take_fence
from tests.fakes_nfs import cached_listing, done_but_answered, refused_once


class OneWeight:
    """The smallest policy that can be saved."""

    num_updates = num_skipped = 0

    def save_model(self, folder: Path) -> None:
        (folder / "config.json").write_text("{}")

    def optimizer_state(self) -> dict[str, Tensor]:
        return {"exp_avg:weight": torch.zeros(1)}


def state(step: int, *, journaled: int = 0) -> LearnerState:
    return LearnerState(step=step, version=step, journaled=journaled)


def owner(folder: Path) -> CheckpointStore:
    store = CheckpointStore(folder)
    store.take_fence()
    return store


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name[5:13]) for path in folder.glob("step-*"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


@pytest.fixture
def journal_folder(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def open_journal(journal_folder: Path) -> Iterator[dict[int, Journal]]:
    """Fence -> its journal; each appended three records, the first one two more when the second was there."""
    journals: dict[int, Journal] = {}
    for fence in (1, 2):
        journals[fence] = Journal.open(journal_folder, fence)
        journals[fence].append([VersionRecord(n) for n in range(3)])
    journals[1].append([VersionRecord(8), VersionRecord(9)])
    yield journals
    for journal in journals.values():
        journal.close()


def loaded_step(folder: Path, history: History) -> int | None:
    checkpoint = CheckpointStore(folder).load_latest(history)
    return None if checkpoint is None else checkpoint.state.step


def test_a_listing_that_is_cached_does_not_hide_a_successor(folder: Path) -> None:
    old = owner(folder)
    listing = list(folder.iterdir())
    owner(folder)
    with cached_listing(folder, listing):
        assert newest_fence(folder) == 1, "the fake shows the old listing"
        with pytest.raises(FencedError, match="fence 1, but fence 2"):
            old.check_owner()
    assert sorted(path.name for path in folder.iterdir()) == ["fence-1", "fence-2"], "the probe is gone"


def test_a_listing_that_is_cached_does_not_hide_a_segment(journal_folder: Path) -> None:
    listing: list[Path] = []
    for fence in (1, 2):
        listing = list(journal_folder.glob("segment-*"))
        journal = Journal.open(journal_folder, fence)
        journal.append([VersionRecord(fence)])
        journal.close()
    assert [path.name for path in listing] == ["segment-1-1"]
    with cached_listing(journal_folder, listing):
        journal = Journal.open(journal_folder, 3)
        journal.close()
    assert [record for _, record in journal.history.read(1)] == [VersionRecord(1), VersionRecord(2)]


@pytest.mark.parametrize(("journaled", "expected"), [(3, 50), (4, 40)])
def test_a_checkpoint_that_goes_beyond_what_counts_of_its_fence_is_refused(
    folder: Path, open_journal: Mapping[int, Journal], caplog: pytest.LogCaptureFixture, journaled: int, expected: int
) -> None:
    store = owner(folder)
    store.save(state(40, journaled=2), OneWeight())
    store.save(state(50, journaled=journaled), OneWeight())
    with caplog.at_level(logging.WARNING):
        assert loaded_step(folder, History.find(open_journal[1].history.folder)) == expected
    assert ("goes up to journal record 4, but of fence 1 only those up to 3 count" in caplog.text) == (expected == 40)


def test_the_newest_fence_may_go_to_the_end_of_the_journal(folder: Path, open_journal: Mapping[int, Journal]) -> None:
    owner(folder)
    store = owner(folder)
    history = History.find(open_journal[1].history.folder)
    store.save(state(1, journaled=6), OneWeight())
    assert loaded_step(folder, history) == 1
    store.save(state(2, journaled=7), OneWeight())
    assert loaded_step(folder, history) == 1, "the journal is a copy that was made before"


def test_it_is_refused_also_when_its_fence_has_no_segment_left(
    folder: Path, journal_folder: Path, open_journal: Mapping[int, Journal]
) -> None:
    open_journal[2].prune(4)
    assert not list(journal_folder.glob("segment-1-*"))
    store = owner(folder)
    store.save(state(50, journaled=5), OneWeight())
    history = History.find(journal_folder)
    with pytest.raises(CheckpointError, match=r"can be used.*fence 1 only those up to 3 count"):
        CheckpointStore(folder).load_latest(history)
    assert CheckpointStore(folder).load_latest() is not None, "who wants only the model gets it"


def test_what_was_refused_takes_no_place_among_the_kept(folder: Path, open_journal: Mapping[int, Journal]) -> None:
    old = owner(folder)
    old.save(state(40, journaled=2), OneWeight())
    old.save(state(50, journaled=5), OneWeight())
    owner(folder)
    store = owner(folder)
    store.load_latest(History.find(open_journal[1].history.folder))
    store.save(state(60, journaled=9), OneWeight())
    store.prune(keep=2)
    assert steps_in(folder) == [40, 60]


def test_a_rename_whose_reply_was_lost_was_done(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = owner(folder)
    monkeypatch.setattr(os, "rename", done_but_answered(os.rename, FileNotFoundError(errno.ENOENT, "lost")))
    assert store.save(state(1), OneWeight()).is_dir()
    checkpoint = CheckpointStore(folder).load_latest()
    assert checkpoint is not None
    assert checkpoint.state.step == 1


def test_a_rename_that_was_not_done_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = owner(folder)
    monkeypatch.setattr(os, "rename", refused_once(os.rename, FileNotFoundError(errno.ENOENT, "gone")))
    with pytest.raises(CheckpointError, match=r"save-1 cannot be written: .*gone"):
        store.save(state(1), OneWeight())


def test_who_finds_nothing_to_rename_because_a_successor_deleted_it_is_told_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, rename = owner(folder), os.rename

    def sleep_before(partial: Path, final: Path) -> None:
        owner(folder).prune(keep=1)
        rename(partial, final)

    store.save(state(1), OneWeight())
    monkeypatch.setattr(os, "rename", sleep_before)
    with pytest.raises(FencedError):
        store.save(state(2), OneWeight())


@pytest.mark.parametrize("number", [errno.ENOTEMPTY, errno.EBUSY, errno.ENOENT])
def test_a_checkpoint_that_somebody_reads_is_deleted_later(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    store = owner(folder)
    for step in (1, 2, 3):
        store.save(state(step), OneWeight())
    monkeypatch.setattr(shutil, "rmtree", refused_once(shutil.rmtree, OSError(number, "held open")))
    with caplog.at_level(logging.WARNING):
        store.prune(keep=1)
    assert len(steps_in(folder)) == 2, "one of two was deleted all the same"
    assert "held open; the next prune tries again" in caplog.text
    store.prune(keep=1)
    assert steps_in(folder) == [3]


def test_a_checkpoint_that_may_not_be_deleted_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = owner(folder)
    for step in (1, 2):
        store.save(state(step), OneWeight())
    monkeypatch.setattr(shutil, "rmtree", refused_once(shutil.rmtree, OSError(errno.EACCES, "not yours")))
    with pytest.raises(OSError, match="not yours"):
        store.prune(keep=1)


def test_a_fence_that_was_won_and_reported_lost_only_burns_a_number(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", done_but_answered(os.open, FileExistsError(errno.EEXIST, "lost")))
        fence = take_fence(folder)
    assert fence == 2
    check_owner(folder, fence)
    assert take_fence(folder) == 3
    with pytest.raises(FencedError):
        check_owner(folder, fence)
