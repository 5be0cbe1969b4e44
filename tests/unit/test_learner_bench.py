"""What benchmarks/learner.py compares must be the same step, and its numbers what they are called."""

from pathlib import Path

import pytest
import torch

from benchmarks.lengths import DISTRIBUTIONS, GroupLengths, draw_groups
from benchmarks.memory import ResidentMemory
from benchmarks.model_shapes import ModelShape
from benchmarks.peers import PEERS
from benchmarks.peers.interface import Setting
from benchmarks.peers.worker import Plan

TINY = ModelShape(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=99,
    tie_word_embeddings=False,
)
MIB = 2**20


def test_peers_take_the_same_step_from_the_same_groups(tmp_path: Path) -> None:
    TINY.write(tmp_path)
    lengths = [GroupLengths(3, (5, 20, 9)), GroupLengths(7, (1, 2, 30))]
    plan = Plan(TINY, tmp_path, "cpu", 1, 64, 1, {"odd": lengths})
    workload = plan.workload(lengths)
    setting = Setting(tmp_path, plan.config, torch.device("cpu"))
    norms = {name: PEERS[name](setting).step(workload) for name in ("ours", "padded", "naive")}
    assert norms["ours"] > 0.01
    assert norms == pytest.approx(dict.fromkeys(norms, norms["ours"]), rel=1e-4)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_groups_are_the_fewest_with_enough_tokens_and_repeatable(name: str) -> None:
    groups = draw_groups(name, seed=3, num_tokens=5_000, group_size=4, scale=2)
    assert groups == draw_groups(name, seed=3, num_tokens=5_000, group_size=4, scale=2)
    assert sum(group.num_tokens for group in groups) >= 5_000 > sum(group.num_tokens for group in groups[:-1])
    assert all(len(group.completions) == 4 and min(group.prompt, *group.completions) >= 1 for group in groups)


def test_the_gauge_sees_a_peak_that_is_over() -> None:
    gauge = ResidentMemory()
    idle = gauge.restart()
    torch.ones(64 * MIB // 4)
    assert gauge.peak() - idle > 60 * MIB
    assert gauge.restart() - idle < 30 * MIB
    assert gauge.peak() - idle < 30 * MIB
