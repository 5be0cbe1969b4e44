"""Whether a run kept its promises, from what its processes wrote down and what is left of it; all of it is pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tests.chaos.ledger import Entry, Group, Step, digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Remains:
    """What is left when a run has ended; training indices everywhere."""

    history: Sequence[Step]
    """Of the final policy: the surviving history."""
    consumed: int | None
    """Groups trained or discarded, as the final checkpoint counts them; None where reuse makes it another number."""
    frontier: int
    """Indices below it were granted, as Redis says."""
    held: Mapping[str, frozenset[int]] = field(default_factory=dict)
    """Place (``queue``, ``learner``, ``leased``, ``todo``, ``outbox``) -> indices that are there."""
    kept: frozenset[tuple[str, int]] = frozenset()
    """(producer, sequence number) of the groups that the learner holds durably and has not consumed."""
    counted_bytes: int = 0
    """The byte counter in Redis."""
    queued_bytes: int = 0
    """Bytes of the payloads that the queue's entries name."""
    orphans: int = 0
    """Payloads that no entry names, and entries without a payload."""
    executed: int = 0
    """Calls that the server counted of those which the ledger notes as ``attempted``; 0 where nobody counted."""
    problems: Sequence[str] = ()
    """Why the run did not end by itself: a stuck process, a wrong exit code."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the run's config promises."""

    groups_per_step: int
    drop_above: int
    max_uses: int = 1
    max_bytes: Mapping[str, int] = field(default_factory=dict)
    """Place of a ``sampled`` entry -> most bytes there."""


_NO_ANSWER = ("duplicate", "unleased", "malformed", "quarantined")  # nobody sends what cannot be read
Kind = Literal[
    "lost", "twice", "skipped", "version_reused", "stale", "over_budget", "rewritten", "miscounted", "retried",
    "stuck", "crashed",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken promise."""

    kind: Kind
    detail: str


def check(entries: Sequence[Entry], remains: Remains, bounds: Bounds) -> list[Violation]:
    """Every promise that the run broke."""
    return [
        *_missing(entries, remains),
        *_lost_groups(entries, remains),
        *_twice(remains, bounds),
        *_reused_versions(entries),
        *_stale(remains, bounds),
        *_over_budget(entries, bounds),
        *_rewritten(entries, remains),
        *_miscounted(entries, remains, bounds),
        *_retried(entries, remains),
        *(Violation("stuck", problem) for problem in remains.problems),
    ]


def _missing(entries: Sequence[Entry], remains: Remains) -> list[Violation]:
    """Lost: a group was received, and is nowhere. Skipped: a prompt was granted, and nothing came of it."""
    received = {int(e.fields["index"]) for e in entries if e.what == "received"}  # type: ignore[arg-type]
    leased = {int(e.fields["index"]) for e in entries if e.what == "leased"}  # type: ignore[arg-type]
    accounted = _trained(remains) | _discarded(entries)
    accounted = accounted.union(*remains.held.values())
    end = max(remains.frontier, max(leased | received | {-1}) + 1)
    return [
        Violation("lost" if index in received else "skipped", f"index {index} is neither trained, discarded nor held")
        for index in range(end)
        if index not in accounted
    ]


def _lost_groups(entries: Sequence[Entry], remains: Remains) -> list[Violation]:
    """Once a learner says that a group is durable its actor forgets it: then it is in the surviving history, or kept.

    That its prompt was asked again, and the second answer arrived, does not bring the first one back.
    """
    marks: dict[str, int] = {}
    for entry in entries:
        if entry.what == "committed":
            for producer, mark in entry.fields["watermarks"].items():  # type: ignore[union-attr]
                marks[producer] = max(marks.get(producer, 0), mark)  # type: ignore[type-var, assignment]
    received = {_group_of(entry) for entry in entries if entry.what == "received"}
    trained = {(group.producer, group.seq) for step in remains.history for group in step.groups}
    discarded = {_group_of(entry) for entry in entries if entry.what == "discarded"}
    return [
        Violation("lost", f"group {seq} of {producer} was committed, and is neither trained, discarded nor kept")
        for producer, seq in sorted(received - trained - discarded - remains.kept)
        if seq <= marks.get(producer, 0)
    ]


def _group_of(entry: Entry) -> tuple[str, int]:
    return str(entry.fields["producer"]), int(entry.fields["seq"])  # type: ignore[arg-type]


def _trained(remains: Remains) -> set[int]:
    return {group.index for step in remains.history for group in step.groups}


def _discarded(entries: Sequence[Entry]) -> set[int]:
    return {int(e.fields["index"]) for e in entries if e.what == "discarded" and e.fields["reason"] not in _NO_ANSWER}  # type: ignore[arg-type]


def _twice(remains: Remains, bounds: Bounds) -> list[Violation]:
    uses: dict[int, list[tuple[int, Group]]] = {}
    for number, step in enumerate(remains.history, start=1):
        for group in step.groups:
            uses.setdefault(group.index, []).append((number, group))
    violations = []
    for index, used in sorted(uses.items()):
        where = ", ".join(f"step {number} ({group.producer} {group.seq})" for number, group in used)
        if len(used) > bounds.max_uses:
            violations.append(Violation("twice", f"index {index} was trained {len(used)} times: {where}"))
        elif len({(group.producer, group.seq) for _, group in used}) > 1:
            violations.append(Violation("twice", f"index {index} was trained as two groups: {where}"))
    return violations


def _reused_versions(entries: Sequence[Entry]) -> list[Violation]:
    """A number that anybody may have seen names one set of weights for ever."""
    seen: dict[int, dict[str, str]] = {}
    for entry in entries:
        if entry.what in ("published", "adopted"):
            version, weights = int(entry.fields["version"]), str(entry.fields["weights"])  # type: ignore[arg-type]
            seen.setdefault(version, {}).setdefault(weights, entry.who)
    return [
        Violation(
            "version_reused", f"version {version} is {' and '.join(f'{w[:8]} of {who}' for w, who in by.items())}"
        )
        for version, by in sorted(seen.items())
        if len(by) > 1
    ]


def _stale(remains: Remains, bounds: Bounds) -> list[Violation]:
    return [
        Violation("stale", f"step {number} at version {step.version} used index {group.index} of {group.min_version}")
        for number, step in enumerate(remains.history, start=1)
        for group in step.groups
        if not 0 <= step.version - group.min_version <= bounds.drop_above
    ]


def _over_budget(entries: Sequence[Entry], bounds: Bounds) -> list[Violation]:
    most: dict[str, int] = {}
    for entry in entries:
        if entry.what == "sampled":
            place, num_bytes = str(entry.fields["place"]), int(entry.fields["bytes"])  # type: ignore[arg-type]
            most[place] = max(most.get(place, 0), num_bytes)
    return [
        Violation("over_budget", f"{place} held {num_bytes} bytes, {bounds.max_bytes[place]} are allowed")
        for place, num_bytes in sorted(most.items())
        if num_bytes > bounds.max_bytes.get(place, num_bytes)
    ]


def _rewritten(entries: Sequence[Entry], remains: Remains) -> list[Violation]:
    """What a checkpoint or the journal made durable is how it was, for ever: the surviving history goes on from it."""
    violations, steps = [], len(remains.history)
    for entry in entries:
        if entry.what == "checkpoint":
            step = int(entry.fields["step"])  # type: ignore[arg-type]
            if step > steps or digest(remains.history[:step]) != entry.fields["digest"]:
                violations.append(
                    Violation("rewritten", f"the checkpoint of step {step} by {entry.who} did not survive")
                )
    return violations + _redone_differently(entries, remains)


def _redone_differently(entries: Sequence[Entry], remains: Remains) -> list[Violation]:
    """A journaled step is trained as it was written, by whoever comes to it.

    Records behind what a later fence found in the journal count for nobody: a learner that lost the run goes on writing
    until it notices.
    """
    fences = {entry.who: int(entry.fields["fence"]) for entry in entries if entry.what == "claimed"}  # type: ignore[arg-type]
    found = [(fences.get(e.who, 0), int(e.fields["next"])) for e in entries if e.what == "opened"]  # type: ignore[arg-type]
    violations = []
    for entry in entries:
        if entry.what != "step":
            continue
        fence, number, step = fences.get(entry.who, 0), int(entry.fields["number"]), int(entry.fields["step"])  # type: ignore[arg-type]
        if any(later > fence and next_number <= number for later, next_number in found):
            continue
        if step > len(remains.history):
            violations.append(Violation("rewritten", f"step {step}, journaled by {entry.who}, was never trained"))
        elif [group.index for group in remains.history[step - 1].groups] != entry.fields["indices"]:
            violations.append(
                Violation("rewritten", f"step {step} was trained otherwise than {entry.who} journaled it")
            )
    return violations


def _miscounted(entries: Sequence[Entry], remains: Remains, bounds: Bounds) -> list[Violation]:
    violations = []
    if remains.counted_bytes != remains.queued_bytes:
        violations.append(f"the byte counter says {remains.counted_bytes}, the queue holds {remains.queued_bytes}")
    if remains.orphans:
        violations.append(f"{remains.orphans} payloads and entries of the queue have no other half")
    # What the learner holds is not consumed yet; elsewhere there may be copies of what it has.
    consumed = len((_trained(remains) | _discarded(entries)) - remains.held.get("learner", frozenset()))
    if remains.consumed not in (None, consumed):
        violations.append(f"{remains.consumed} groups count as consumed, {consumed} were trained or discarded")
    for number, step in enumerate(remains.history, start=1):
        if len(step.groups) != bounds.groups_per_step:
            violations.append(f"step {number} has {len(step.groups)} groups, not {bounds.groups_per_step}")
    return [Violation("miscounted", text) for text in violations]


def _retried(entries: Sequence[Entry], remains: Remains) -> list[Violation]:
    """A client that repeats calls behind our back makes more of them than our loop asked for."""
    attempts = sum(entry.what == "attempted" for entry in entries)
    if remains.executed <= attempts:
        return []
    return [Violation("retried", f"{attempts} calls were attempted, the server counts {remains.executed}")]
