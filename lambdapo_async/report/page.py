"""report.html: one run on one self-contained page."""

import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from lambdapo_async.durable import explaining_refusal, replace_file
from lambdapo_async.metrics import EVENT, MetricRow
from lambdapo_async.report.curves import CHARTS, REWARD_CHART, draw, marked_events
from lambdapo_async.report.run_folder import RunFolderError, RunRecord, Sample, read_run
from lambdapo_async.report.summary import summarise

_REPORT = "report.html"
_TEMPLATE = "report.html.j2"


@dataclass(frozen=True, slots=True)
class Comparison:
    """The same held-out prompt, answered by the first and the last evaluated policy."""

    prompt: str
    answer: str
    before: Sample
    after: Sample


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into a run's folder from the files that lie there; returns its path.

    Raises:
        RunFolderError: no run is there, or the disk refused.
    """
    page = render(read_run(folder))
    path = folder / _REPORT
    with explaining_refusal(path, RunFolderError):
        replace_file(path, page.encode())
    return path


def render(record: RunRecord) -> str:
    """The page's HTML; nothing in it is loaded from elsewhere."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lambdapo_async", "report"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    rows = record.rows
    return environment.get_template(_TEMPLATE).render(
        record=record,
        facts=_facts(record),
        summary=summarise(rows, target=record.target).table(),
        reward_curve=draw(REWARD_CHART, rows, target=record.target, width=9.4),
        curves=[(chart.title, draw(chart, rows)) for chart in CHARTS],
        events=marked_events(rows),
        num_unmarked=sum(row.kind == EVENT for row in rows) - len(marked_events(rows)),
        comparisons=compare(record.samples),
        config=json.dumps(record.config, indent=2),
        started_at=rows[0].time,
    )


def compare(samples: Sequence[Sample]) -> list[Comparison]:
    """Prompts that both the first and the last evaluation have samples of."""
    if not samples:
        return []
    first, last = min(sample.step for sample in samples), max(sample.step for sample in samples)
    before = {sample.prompt: sample for sample in samples if sample.step == first}
    after = {sample.prompt: sample for sample in samples if sample.step == last}
    return [Comparison(p, before[p].answer, before[p], after[p]) for p in before if p in after]


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    """The header's lines; what nobody recorded is left out."""
    facts = [
        ("model", record.config.get("model", {}).get("path", "")),
        ("task", record.config.get("task", {}).get("kind", "")),
        ("machine", record.machine),
        ("started", _date(record.rows[0])),
        ("recorded", f"{record.rows[-1].time - record.rows[0].time:.0f} s"),
    ]
    return [(name, value) for name, value in facts if value]


def _date(row: MetricRow) -> str:
    return datetime.datetime.fromtimestamp(row.time, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
