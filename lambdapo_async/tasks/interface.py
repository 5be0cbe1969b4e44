"""A task is rows and the functions that reward an answer to one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from lambdapo_async.errors import TaskError


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One problem; crosses Redis as a map of these three texts."""

    prompt: str
    """What the model is asked, before any chat template."""
    answer: str
    """The reference final answer."""
    solution: str | None = None
    """A reference solution with its working, for the density reward."""

    def as_map(self) -> dict[str, str | None]:
        """The published form."""
        return {"prompt": self.prompt, "answer": self.answer, "solution": self.solution}

    @classmethod
    def from_map(cls, fields: Mapping[str, str | None]) -> "Row":
        """Inverse of :meth:`as_map`; ``TaskError`` for anything else."""
        prompt, answer, solution = (fields.get(name) for name in ("prompt", "answer", "solution"))
        if not isinstance(prompt, str) or not isinstance(answer, str):
            raise TaskError(f"a row needs texts prompt and answer, got {dict(fields)!r:.200}")
        return cls(prompt=prompt, answer=answer, solution=solution)


class RewardFunction(Protocol):
    """Scores completions of one row. Runs in a worker process, so it may be slow, never asynchronous."""

    def __call__(self, row: Row, completions: Sequence[str]) -> list[float]:
        """One verifiable reward in [0, 1] per completion."""


@dataclass(frozen=True, slots=True)
class Scored:
    """Reward of one completion."""

    reward: float
    """R"""
    parts: Mapping[str, float]
    """``verifiable`` (V), each reward function by name, and ``density`` where it was computed."""


class Task(Protocol):
    """Rows on the learner's side, scoring on the actor's."""

    def train_rows(self) -> Sequence[Row]:
        """All training rows, in file order."""

    def heldout_rows(self) -> Sequence[Row]:
        """All held-out rows."""

    def render(self, row: Row) -> str:
        """The prompt's text for a model without a chat template."""

    def score(self, row: Row, completions: Sequence[str]) -> list[Scored]:
        """Verifiable reward and density of each completion."""
