"""How far a step's engines are from the learner: over which tokens, with which policy, and of which group."""

import math

import pytest

from learner.trainer import Trainer
from tests.step_groups import LENGTHS, config, groups_by, preset
from tests.unit.test_trainer import bigram, shifted


def test_mismatch_counts_only_tokens_of_the_newest_version() -> None:
    policy, run = bigram(lr=0.0), config()
    scorer = shifted(policy.completion_logprobs, 0.3)
    stale = Trainer(policy, run).step(groups_by(scorer, versions=(1,)), version=2)  # type: ignore[arg-type]
    assert stale.metrics["ratio/abs_log_mean"] == stale.metrics["ratio/log_mean"] == pytest.approx(0.3, abs=1e-3)
    assert "mismatch/fresh" not in stale.metrics
    fresh = Trainer(policy, run).step(groups_by(scorer, versions=(2,)), version=2)  # type: ignore[arg-type]
    assert fresh.metrics["mismatch/fresh"] == pytest.approx(0.3, abs=1e-3)


def test_where_contexts_are_kept_a_token_is_fresh_if_all_of_its_rollout_are() -> None:
    """The first group's rollouts began under an older version, and are further off for it."""
    policy = bigram(lr=0.0)
    begun_before = groups_by(shifted(policy.completion_logprobs, 0.9), versions=(1, 2))[0]
    begun_now = groups_by(shifted(policy.completion_logprobs, 0.1), versions=(2,))[1]
    results = [
        Trainer(policy, config(actor={"stale_kv": keeps})).step([begun_before, begun_now], version=2)  # type: ignore[arg-type]
        for keeps in (False, True)
    ]
    late = sum(length // 2 for length in LENGTHS[0])
    assert [[fresh.count for fresh in each.fresh_by_group] for each in results] == [
        [late, sum(LENGTHS[1])],
        [0, sum(LENGTHS[1])],
    ]
    anew, kept = (each.metrics for each in results)
    assert kept["mismatch/fresh"] == pytest.approx(0.1, abs=1e-3)
    assert anew["mismatch/fresh"] > 0.3
    assert kept["mismatch/fresh_share"] == pytest.approx(sum(LENGTHS[1]) / sum(sum(each) for each in LENGTHS))
    assert kept["staleness/share_0"] == anew["staleness/share_0"] == anew["mismatch/fresh_share"]


@pytest.mark.parametrize("updates", [{"epochs": 3}, {"minibatches": 2}, {"minibatches": 2, "epochs": 2}])
@pytest.mark.parametrize("name", ["decoupled", "ppo"])
def test_mismatch_is_the_engine_s_and_not_the_step_s_own_updates(name: str, updates: dict[str, int]) -> None:
    policy = bigram(lr=200.0)
    groups = groups_by(policy.completion_logprobs)  # by an engine without error
    result = Trainer(policy, config(learner=updates, objective=preset(name))).step(groups, version=0)  # type: ignore[arg-type]
    assert result.metrics["ratio/abs_log_mean"] > 1e-4
    assert result.metrics["mismatch/fresh"] == pytest.approx(0.0, abs=1e-6)
    # Of the second minibatch ppo computes nothing before it moves.
    is_measured = name == "decoupled" or "minibatches" not in updates
    assert [fresh.count for fresh in result.fresh_by_group] == [sum(LENGTHS[0]), sum(LENGTHS[1]) * is_measured]
    assert sum(fresh.k3_sum for fresh in result.fresh_by_group) == pytest.approx(0.0, abs=1e-6)
    measured = sum(fresh.count for fresh in result.fresh_by_group)
    assert result.metrics["mismatch/fresh_share"] == pytest.approx(measured / sum(sum(each) for each in LENGTHS))


def test_a_step_of_one_group_measures_one() -> None:
    policy = bigram(lr=0.0)
    group = groups_by(policy.completion_logprobs, noise=0.4)[0]
    (fresh,) = Trainer(policy, config()).step([group], version=0).fresh_by_group  # type: ignore[arg-type]
    assert fresh.count == group.group.num_completion_tokens


@pytest.mark.parametrize("minibatches", [1, 2])
def test_each_group_is_measured_over_the_tokens_of_the_learners_version(minibatches: int) -> None:
    """What an actor is judged by: k3 between its engine and the learner, stale tokens left out."""
    policy = bigram(lr=0.0)
    groups = groups_by(policy.completion_logprobs, noise=0.4, versions=(1, 3))
    result = Trainer(policy, config(learner={"minibatches": minibatches})).step(groups, version=3)  # type: ignore[arg-type]
    for received, found in zip(groups, result.fresh_by_group, strict=True):
        expected = []
        for rollout in received.group.rollouts:
            logprobs = policy.completion_logprobs(received.group.prompt_ids, rollout.completion_ids)
            for log_pi, log_mu, version in zip(
                logprobs, rollout.behavior_logprobs, rollout.token_versions, strict=True
            ):
                if version == 3:
                    expected.append(math.exp(log_pi - log_mu) - 1 - (log_pi - log_mu))
        assert 0 < len(expected) < received.group.num_completion_tokens
        assert found.count == len(expected)
        assert found.k3_sum == pytest.approx(sum(expected), rel=1e-4)
