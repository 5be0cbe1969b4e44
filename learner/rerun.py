"""Steps that were journaled, taken again: behind a checkpoint after a crash, or of a whole recorded run."""

from collections.abc import Callable, Iterable, Iterator

from lambdapo_async.journal.records import Record, StepRecord
from lambdapo_async.journal.redo import redo
from learner.arrivals import Arrival, Screen
from learner.pool import Pool, StepBatch


class Rerun:
    """Gives each step the batch that it had.

    Args:
        pool: as the checkpoint, or the beginning of the run, left it.
        on_heldout: is handed the held-out answers, in their order.
    """

    def __init__(self, pool: Pool, screen: Screen, *, on_heldout: Callable[[Arrival], None]) -> None:
        self._pool, self._screen, self._on_heldout = pool, screen, on_heldout
        self.left_over: list[Arrival] = []
        """What arrived after the last step, once all were taken again."""

    def steps(self, records: Iterable[tuple[int, Record]], *, step: int) -> Iterator[tuple[StepRecord, StepBatch]]:
        """The steps after ``step``, each when the one before was trained.

        Args:
            records: of the journal, from the first that the pool had not taken on, or earlier.

        Raises:
            JournalError: the journal is damaged, or lacks a step.
            ReplayError: a step cannot have been so with these settings.
        """
        for part in redo(records, taken=self._pool.taken, step=step):
            arrivals = [self._screen.restore(number, record) for number, record in part.arrivals]
            if part.step is None:
                self.left_over = arrivals
                return
            for arrival in arrivals:
                if not arrival.is_training:
                    self._on_heldout(arrival)
            yield part.step, self._pool.redo(part.step, arrivals)
