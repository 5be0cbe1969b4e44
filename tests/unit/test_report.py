import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lambdapo_async.config import RunConfig
from lambdapo_async.metrics import EVAL, EVENT, STEP, MetricRow, MetricsLog
from lambdapo_async.report.curves import REWARD_CHART, draw, marked_events
from lambdapo_async.report.page import compare, write_report
from lambdapo_async.report.run_folder import RunFolderError, Sample, read_run, write_header
from lambdapo_async.report.summary import KILLED, summarise
from tests.full_disk import full_disk
from tests.metric_rows import eval_row, event_row, step_row

CONFIG = RunConfig.model_validate(
    {
        "model": {"path": "starter"},
        "task": {"kind": "arithmetic"},
        "evaluation": {"target": 0.9},
        "broker": {"url": "redis://user:hunter2@example:1"},
    }
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "demo-1"
    write_header(folder, "demo-1", CONFIG)
    with MetricsLog(folder / "metrics.jsonl") as log:
        log.write(EVAL, 0, {"eval/reward": 0.4})
        for step in (1, 2, 3):
            log.write(STEP, step, {"reward/mean": 0.4 + step / 10, "queue/groups": 4, "time/step_s": 0.1})
        log.write(EVENT, 2, {"text": f"{KILLED} actor-0 <b>now</b>"})
        log.write(EVAL, 3, {"eval/reward": 0.95})
    samples = [
        {"step": step, "split": "heldout", "prompt": "1+1=", "text": text, "answer": "2", "reward": reward}
        for step, text, reward in ((0, "3</div>", 0.0), (3, "two & right", 1.0))
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return folder


class Links(HTMLParser):
    """Collects what a page would load, and checks that its elements are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(folder):
    page = write_report(folder).read_text()
    links = Links()
    links.feed(page)
    assert links.open == []
    assert all(link.startswith("#") for link in links.loaded)
    assert "url(http" not in page
    assert "@import" not in page


def test_the_page_shows_numbers_samples_events_and_config_escaped(folder):
    page = write_report(folder).read_text()
    assert "0.400 to 0.950" in page
    assert "3&lt;/div&gt;" in page
    assert "two &amp; right" in page
    assert f"{KILLED} actor-0 &lt;b&gt;now&lt;/b&gt;" in page
    assert "group_size" in page
    assert "hunter2" not in page


def test_every_id_on_the_page_is_unique_so_that_charts_do_not_clip_each_other(folder):
    page = write_report(folder).read_text()
    clips = re.findall(r'<clipPath id="([^"]+)"', page)
    assert len(clips) == len(set(clips)) > 1


def test_a_run_without_samples_header_or_events_still_has_a_page(folder):
    (folder / "samples.jsonl").unlink()
    (folder / "run.json").unlink()
    page = write_report(folder).read_text()
    assert "No held-out prompt" in page
    assert "Not recorded" in page


def test_a_folder_without_metrics_is_named(tmp_path):
    with pytest.raises(RunFolderError, match="holds no run"):
        write_report(tmp_path)


def test_a_damaged_header_is_named(folder):
    (folder / "run.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"run\.json is damaged"):
        read_run(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [("run.json", "[1]"), ("run.json", '{"config": 3}'), ("samples.jsonl", '{"step": 1}\n')],
)
def test_what_is_not_a_runs_file_is_named(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(RunFolderError, match=f"{re.escape(name)} is damaged: .*delete it"):
        write_report(folder)


def test_a_report_on_a_full_disk_leaves_the_old_one(folder: Path) -> None:
    before = write_report(folder).read_bytes()
    with full_disk(100), pytest.raises(RunFolderError, match=r"report\.html cannot be written: .*free disk space"):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == before
    assert not list(folder.glob("*.partial"))


def test_a_chart_takes_its_ink_from_the_page_and_skips_what_was_not_measured():
    svg = draw(REWARD_CHART, [step_row(1, 1.0, reward__mean=math.nan)])
    assert svg.startswith("<svg")
    assert "currentColor" in svg
    assert "#123457" not in svg
    assert "training rollouts" not in svg
    assert "training rollouts" in draw(REWARD_CHART, [step_row(1, 1.0, reward__mean=0.5)])


def test_checkpoints_and_alarms_are_not_marked():
    rows = [event_row(1, 1.0, text) for text in ("checkpoint", "alarm: x", "suspended")]
    assert [row.text for row in marked_events(rows)] == ["suspended"]


def test_samples_are_compared_by_prompt_between_the_first_and_the_last_evaluation():
    def sample(step: int, prompt: str) -> Sample:
        return Sample(step, prompt, f"at {step}", "2", 1.0)

    pairs = compare([sample(0, "a"), sample(0, "b"), sample(5, "a"), sample(10, "a"), sample(10, "c")])
    assert [(pair.prompt, pair.before.text, pair.after.text) for pair in pairs] == [("a", "at 0", "at 10")]
    assert compare([]) == []


def test_the_summary_counts_seconds_from_the_start_of_the_first_step():
    rows = [
        eval_row(0, 99.0, 0.4),
        step_row(1, 102.0, time__step_s=2.0, staleness__max=0),
        event_row(1, 103.0, f"{KILLED} actor-0"),
        step_row(2, 104.0, time__step_s=1.0, staleness__max=2),
        eval_row(2, 105.0, 0.92),
        step_row(3, 106.0, time__step_s=1.0, staleness__max=1),
        eval_row(3, 107.0, 0.91),
    ]
    summary = summarise(rows, target=0.9)
    assert (summary.steps, summary.heldout_start, summary.heldout_end) == (3, 0.4, 0.91)
    assert (summary.seconds_to_target, summary.seconds) == (5.0, 7.0)
    assert summary.is_target_reached
    assert (summary.staleness_max, summary.actors_killed) == (2.0, 1)
    assert dict(summary.table())["target"] == "0.9, after 5 s from the first step"


def _measured(step: int, *, tokens: int, seconds: float, **values: float) -> MetricRow:
    speed = {"speed__tokens_per_s": tokens / seconds, "tokens__trained": tokens}
    return step_row(step, 1e4 * step, **speed, **values)  # hours apart: suspended in between


def test_the_summary_weighs_each_mean_by_what_it_is_a_mean_of():
    rows = [
        _measured(1, tokens=100, seconds=1.0, mismatch_kl=1.0, mismatch__fresh=4.0, mismatch__fresh_share=1.0,
                  actors__tokens_per_s=800.0, actors__idle_share=0.0, staleness__mean=0.0, groups__trained=2),
        _measured(2, tokens=300, seconds=3.0, mismatch_kl=3.0, mismatch__fresh=8.0, mismatch__fresh_share=0.1,
                  actors__tokens_per_s=400.0, actors__idle_share=0.4, staleness__mean=3.0, groups__trained=6),
        _measured(3, tokens=400, seconds=1.0, mismatch_kl=2.0, mismatch__fresh_share=0.0,
                  actors__tokens_per_s=300.0, actors__idle_share=0.8, staleness__mean=1.0, groups__trained=8),
    ]  # fmt: skip
    summary = summarise(rows, target=None)
    assert summary.mismatch_fresh == pytest.approx((4.0 * 100 + 8.0 * 30) / 130)
    assert summary.mismatch_kl == pytest.approx((1.0 * 100 + 3.0 * 300 + 2.0 * 400) / 800)
    assert summary.staleness_mean == pytest.approx((0.0 * 2 + 3.0 * 4 + 1.0 * 2) / 8)
    assert summary.actor_tokens_per_s == pytest.approx((800 * 1 + 400 * 3 + 300 * 1) / 5)
    assert summary.actor_idle_share == pytest.approx((0.4 * 3 + 0.8 * 1) / 5)


def test_the_learners_speed_counts_neither_the_first_step_nor_the_time_it_was_suspended():
    rows = [
        _measured(1, tokens=1000, seconds=50.0, speed__idle_share=1.0),
        _measured(2, tokens=600, seconds=1.0, speed__idle_share=0.2),
        _measured(3, tokens=400, seconds=3.0, speed__idle_share=0.6),
    ]
    summary = summarise(rows, target=None)
    assert summary.learner_tokens_per_s == pytest.approx(1000 / 4)
    assert summary.learner_idle_share == pytest.approx((0.2 * 1 + 0.6 * 3) / 4)


@pytest.mark.parametrize("rows", [[], [eval_row(0, 1.0, 0.4)], [step_row(1, 1.0)]])
def test_a_summary_of_next_to_nothing_has_dashes(rows):
    summary = summarise(rows, target=0.9)
    assert not summary.is_target_reached
    assert math.isnan(summary.learner_tokens_per_s)
    assert dict(summary.table())["learner"] == "- tokens/s, idle -"
