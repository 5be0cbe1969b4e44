"""Whether processes ended by themselves for good reasons alone; a crash loop loses nothing, and is a bug."""

import re
from collections import Counter
from collections.abc import Sequence

from tests.chaos.ledger import Entry
from tests.chaos.proof import Violation

MOST_ENDS = 4
"""Learners of one run that may end by themselves, all saying the same."""

_FINE = {
    "learner": re.compile(
        r"error: another learner owns the run now"
        r"|error: \S+: this learner holds fence \d+, but fence \d+ was taken since"
        r"|error: \S+ was taken over by fence \d+"
        r"|error: \S+ is gone: another learner took the journal over"
        r"|error: \S+ did not answer (in time .*)?for"
        r"|error: \S+ was out of memory .* for"  # when it began: a running one waits for broker.outage_s
    ),
    "actor": re.compile(
        # It was started while Redis had nothing of the run.
        r"error: this Redis holds no run|error: run \S+ has no (train rows|heldout rows|model files|config) yet"
    ),
}
"""Role -> what a process may say last when it ends by itself."""


def bad_endings(entries: Sequence[Entry]) -> list[Violation]:
    """What no process should have died of, and what too many learners died of without any reason from outside."""
    ends = [entry for entry in entries if entry.what == "ended" and _is_an_error(entry)]
    violations = [
        Violation("crashed", f"{_who(end)} ended with {end.fields['returncode']}: {_said(end)}")
        for end in ends
        if not _FINE[_role(end)].match(_said(end))
    ]
    alone = (end for end in ends if _role(end) == "learner" and not end.fields["is_expected"])
    loops = Counter(re.sub(r"\d+", "N", _said(end)) for end in alone)
    return violations + [
        Violation("crashed", f"{count} learners ended one after another: {said}")
        for said, count in loops.items()
        if count > MOST_ENDS
    ]


def _is_an_error(end: Entry) -> bool:
    """Neither killed nor ended with 0."""
    return int(end.fields["returncode"]) > 0  # type: ignore[arg-type]


def _who(end: Entry) -> str:
    return str(end.fields["process"])


def _said(end: Entry) -> str:
    return str(end.fields["said"])


def _role(end: Entry) -> str:
    return _who(end).partition("-")[0]
