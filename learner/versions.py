"""Numbers of policy versions: one names one set of weights for ever, whoever dies and whatever Redis forgets."""

from lambdapo_async.journal.journal import Journal
from lambdapo_async.journal.records import VersionRecord


class VersionCounter:
    """Counts up, and writes each number down before anybody can see it.

    Args:
        newest: largest number that any learner may have given; -1 before the first.
    """

    def __init__(self, journal: Journal, newest: int) -> None:
        self._journal = journal
        self.newest = newest
        """Of the policy as it was published last."""

    def claim(self) -> int:
        """The next number, which no other weights will ever have.

        Raises:
            JournalError: the disk refused.
        """
        self._journal.append([VersionRecord(self.newest + 1)])
        self.newest += 1
        return self.newest
