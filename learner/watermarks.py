"""Per producer: up to which sequence number everything is done."""

from collections.abc import Mapping


class Watermarks:
    """Raises a producer's mark over consecutive finished numbers; groups may finish in any order."""

    def __init__(self, marks: Mapping[str, int]) -> None:
        self._marks = dict(marks)
        self._ahead: dict[str, set[int]] = {}

    def done(self, producer: str, seq: int) -> None:
        """``seq`` was trained on or discarded."""
        mark = self._marks.get(producer, 0)
        if seq <= mark:
            raise ValueError(f"{producer} {seq} was done before: the mark stands at {mark}")
        ahead = self._ahead.setdefault(producer, set())
        ahead.add(seq)
        while mark + 1 in ahead:
            mark += 1
            ahead.remove(mark)
        self._marks[producer] = mark

    def snapshot(self) -> dict[str, int]:
        """producer -> highest number up to which all are done."""
        return dict(self._marks)
