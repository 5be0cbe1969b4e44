"""An actor's log has a line a minute."""

import pytest

from actors.progress import ProgressLog
from lambdapo_async.broker.heartbeat import Heartbeat

HEARTBEAT = Heartbeat(
    actor_id="a", host="node", pid=7, state="sampling", device="cpu", dtype="bfloat16", engine="scripted 1",
    policy_version=3, groups_in_flight=2, groups_sent=1234, completions=9, tokens=80, tokens_per_s=40.4,
    idle_share=0.25, counters={}, sent_at=0.0,
)  # fmt: skip


def test_a_line_a_minute_says_what_the_actor_does(caplog: pytest.LogCaptureFixture) -> None:
    clock = iter((100.0, 102.0, 161.0, 161.0, 163.0, 190.0, 221.5, 221.5))
    progress = ProgressLog(lambda: next(clock))
    with caplog.at_level("INFO"):
        for _ in range(5):
            assert progress.told(HEARTBEAT) is HEARTBEAT
    line = "sampling: version 3, 2 groups in flight, 1234 sent, 40 tokens/s, idle 25 %"
    assert [record.getMessage() for record in caplog.records] == [line, line]
