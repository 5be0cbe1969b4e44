"""One training step: against REINFORCE a document at a time, and against what each update should have been."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from lambdapo_async.config import RunConfig
from lambdapo_async.errors import ConfigError
from lambdapo_async.objective.advantage import estimate_advantages
from lambdapo_async.objective.presets import PRESETS
from lambdapo_async.packing import MicroBatch
from learner.sequences import proximal_confidence, rank_shares, training_sequences
from learner.trainer import Trainer
from tests.bigram_policy import BigramPolicy
from tests.step_groups import LENGTHS, REGULARISED, REWARDS, Scorer, advantages_of, config, groups_by, preset
from tests.tiny_models import VOCAB


def shifted(score: Scorer, offset: float) -> Scorer:
    return lambda prompt, completion: score(prompt, completion) - offset


def bigram(*, lr: float = 0.5) -> BigramPolicy:
    return BigramPolicy(vocab=VOCAB, lr=lr)


def stepped(run: RunConfig, *, lr: float = 0.5, version: int = 3, noise: float = 0.3) -> tuple[BigramPolicy, dict]:
    """A bigram policy after one step on noisy, stale groups, and the step's metrics."""
    policy = bigram(lr=lr)
    groups = groups_by(policy.completion_logprobs, noise=noise, versions=(1, 3))
    reference = reference_of(BigramPolicy(vocab=VOCAB, lr=0.0, seed=1))
    result = Trainer(policy, run, reference).step(groups, version=version)  # type: ignore[arg-type]
    return policy, result.metrics


def reference_of(policy: BigramPolicy) -> Callable[[MicroBatch], Tensor]:
    def logprobs(micro_batch: MicroBatch) -> Tensor:
        return torch.where(micro_batch.loss_mask_T, policy.logprobs(micro_batch), math.nan)

    return logprobs


@pytest.mark.parametrize("name", PRESETS)
def test_on_policy_every_preset_is_reinforce(name: str) -> None:
    run = config(objective={"policy_loss": {"preset": name, "reduce": "token"}})
    policy = bigram()
    groups = groups_by(policy.completion_logprobs)
    loss, tokens = torch.zeros((), dtype=torch.float64), 0
    for received, row in zip(groups, advantages_of(groups, run), strict=True):
        for rollout, advantage in zip(received.group.rollouts, row, strict=True):
            ids = [*received.group.prompt_ids.tolist(), *rollout.completion_ids.tolist()]
            for before, after in list(itertools.pairwise(ids))[len(received.group.prompt_ids) - 1 :]:
                loss, tokens = loss - float(np.float32(advantage)) * policy.table()[before, after], tokens + 1
    (expected,) = torch.autograd.grad(loss / tokens, policy.logits_VV)
    Trainer(policy, run).step(groups, version=0)  # type: ignore[arg-type]
    torch.testing.assert_close(policy.gradients[0], expected, rtol=1e-5, atol=1e-8)


def test_every_column_of_a_sequence_tells_of_its_own_token() -> None:
    groups = groups_by(bigram().completion_logprobs, versions=(1, 3))
    sequences = training_sequences(groups, torch.arange(6.0).reshape(2, 3))
    rollouts = [(received.group, rollout) for received in groups for rollout in received.group.rollouts]
    for number, (sequence, (group, rollout)) in enumerate(zip(sequences, rollouts, strict=True)):
        prompt = group.prompt_ids.tolist()
        columns = (sequence.token_ids, sequence.loss_mask, sequence.behavior_logprobs, sequence.token_versions)
        assert [column.tolist() for column in columns] == [
            prompt + rollout.completion_ids.tolist(),
            [False] * len(prompt) + [True] * rollout.num_tokens,
            [0.0] * len(prompt) + rollout.behavior_logprobs.tolist(),
            [-1] * len(prompt) + rollout.token_versions.tolist(),
        ]
        assert [column.dtype for column in columns] == [np.int32, np.bool_, np.float32, np.int64]
        assert (sequence.advantage, sequence.group_key) == (number, group.lease.id)
    shares = rank_shares(sequences, token_budget=64, num_shares=3)
    assert all(batch.loss_mask_T.any() for share in shares for batch in share), "work for every rank"


@pytest.mark.parametrize("name", ["cispo", "m2po", "gspo", "a3po", "seq_mis"])
def test_micro_batching_changes_nothing(name: str) -> None:
    gradients = []
    for tokens in (64, 20):
        run = config(
            objective=preset(name, **REGULARISED),
            model={"max_length": tokens},
            learner={"micro_batch_tokens": tokens},
            sampling={"max_tokens": 8},
        )
        policy, metrics = stepped(run)
        gradients.append((policy.gradients[0], metrics))
        assert policy.num_batches[0] > 1 or tokens == 64
    torch.testing.assert_close(gradients[1][0], gradients[0][0])
    assert gradients[1][1] == pytest.approx(gradients[0][1], rel=1e-5, abs=1e-9)


def test_epochs_repeat_the_minibatches_with_the_anchor_of_the_start() -> None:
    run = config(learner={"minibatches": 2, "epochs": 3}, objective=preset("decoupled"))
    policy, _ = stepped(run)
    assert policy.num_updates == 6
    assert policy.num_forwards == 2  # one per micro-batch, before the first update, whatever the epochs
    still, _ = stepped(run, lr=0.0)
    assert still.num_updates == 6
    for update in range(2, 6):  # a policy that does not move repeats itself exactly
        assert torch.equal(still.gradients[update], still.gradients[update % 2])
    assert not torch.allclose(policy.gradients[2], policy.gradients[0])


def test_a_trust_region_stops_what_moved_far() -> None:
    """PPO's clip is around the step's start; around pi itself, as in the first update, nothing would ever stop."""
    learner = {"epochs": 12}
    policy, metrics = stepped(config(learner=learner, objective=preset("ppo")), lr=5.0, noise=0.0)
    first, last = policy.gradients[0].norm(), policy.gradients[-1].norm()
    assert last < 0.2 * first
    assert metrics["ratio/clipped_pos"] > 0.1
    assert metrics["ratio/clipped_neg"] > 0.1


def test_several_updates_without_a_trust_region_are_refused() -> None:
    with pytest.raises(ValidationError, match="needs a trust region"):
        config(learner={"epochs": 2}, objective=preset("cispo"))


def test_auto_is_decoupled_where_a_step_takes_several_updates() -> None:
    several = {"learner": {"minibatches": 2}}
    automatic, _ = stepped(config(**several))
    explicit, _ = stepped(config(**several, objective=preset("decoupled")))
    other, _ = stepped(config(**several, objective=preset("ppo")))
    assert torch.equal(automatic.logits_VV, explicit.logits_VV)
    assert not torch.equal(automatic.logits_VV, other.logits_VV)


def test_the_interpolated_anchor_needs_no_forward_pass_and_starts_as_the_proximal_one() -> None:
    several = {"learner": {"epochs": 2}}
    interpolated, _ = stepped(config(**several, objective=preset("a3po")))
    proximal, _ = stepped(config(**several, objective=preset("decoupled")))
    assert interpolated.num_forwards == 0
    assert torch.equal(interpolated.gradients[0], proximal.gradients[0])
    assert not torch.equal(interpolated.gradients[1], proximal.gradients[1])


def test_m2po_solves_its_budget_over_all_tokens_of_the_update() -> None:
    wide, wide_metrics = stepped(config(objective=preset("m2po")), noise=0.05)
    assert wide_metrics["ratio/clipped_pos"] == wide_metrics["ratio/clipped_neg"] == 0
    assert wide.num_forwards == 1
    _, metrics = stepped(config(objective=preset("m2po")), noise=0.6)
    _, ppo = stepped(config(objective=preset("ppo")), noise=0.6)
    clipped = metrics["ratio/clipped_pos"] + metrics["ratio/clipped_neg"]
    assert 0 < clipped < ppo["ratio/clipped_pos"] + ppo["ratio/clipped_neg"]


def test_a_kl_penalty_pulls_towards_the_reference() -> None:
    run = config(
        objective={"kl": {"coefficient": 10.0, "estimator": "k2"}, "advantage": {"estimator": "dr_grpo"}},
        learner={"epochs": 30},
    )
    _, before = stepped(run, lr=0.0)
    policy, after = stepped(run, lr=1.0)
    assert after["kl/reference"] < before["kl/reference"]
    assert before["loss/regularisation"] == pytest.approx(10 * before["kl/reference"], rel=1e-5)
    assert torch.isfinite(policy.logits_VV).all()


def test_an_entropy_bonus_raises_the_entropy() -> None:
    learner = {"epochs": 20}
    _, without = stepped(config(learner=learner))
    _, rewarded = stepped(config(learner=learner, objective={"entropy_coefficient": 1.0}))
    assert rewarded["policy/entropy"] > without["policy/entropy"]
    assert "loss/regularisation" not in without
    assert rewarded["loss/regularisation"] < 0


def test_a_kl_penalty_without_a_reference_is_refused() -> None:
    run = config(objective={"kl": {"coefficient": 0.1}})
    with pytest.raises(ValueError, match="needs a reference policy"):
        Trainer(bigram(), run)  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [64, 20], ids=["one micro-batch", "several"])
def test_proximal_confidence_is_the_learner_s_own(tokens: int) -> None:
    policy = bigram()
    run = config(
        objective={"advantage": {"confidence_policy": "proximal", "confidence": "mean"}},
        model={"max_length": tokens},
        learner={"micro_batch_tokens": tokens},
        sampling={"max_tokens": 8},
    )
    groups = groups_by(policy.completion_logprobs, noise=1.0)
    found = proximal_confidence(policy, groups, run)  # type: ignore[arg-type]
    for received, row in zip(groups, found, strict=True):
        prompt = received.group.prompt_ids
        own = [policy.completion_logprobs(prompt, r.completion_ids).mean() for r in received.group.rollouts]
        assert row.tolist() == pytest.approx(own, rel=1e-5)
    result = Trainer(policy, run).step(groups, version=0)  # type: ignore[arg-type]
    rewards = torch.tensor(np.stack([received.group.rewards for received in groups]))
    advantages = estimate_advantages(rewards, torch.tensor(found), run.objective.advantage)
    assert result.metrics["advantage/shift"] == pytest.approx(float(advantages.mean()))
    assert result.metrics["advantage/shift"] != pytest.approx(float(advantages_of(groups, run).mean()))


def test_metrics_tell_the_age_of_the_tokens_and_what_density_is_worth() -> None:
    _, metrics = stepped(config(), version=3)
    assert metrics["staleness/share_0"] + metrics["staleness/share_2"] == pytest.approx(1.0)
    assert metrics["staleness/share_2"] > 0.3
    density = [0.1 * length for lengths in LENGTHS for length in lengths]
    values = [reward for rewards in REWARDS for reward in rewards]
    assert metrics["density/value_corr"] == pytest.approx(np.corrcoef(density, values)[0, 1])


def test_a_wrong_dotted_path_ends_it_before_anything_is_trained() -> None:
    run = config(objective={"policy_loss": {"preset": "tests.unit.test_trainer:NOTHING"}})
    with pytest.raises(ConfigError, match="has no NOTHING"):
        Trainer(bigram(), run)  # type: ignore[arg-type]


@pytest.mark.parametrize("lengths", [((0, 0), (3, 5)), ((0, 0), (0, 0))])
def test_an_update_without_a_token_is_one_without_a_gradient(lengths: tuple[tuple[int, ...], ...]) -> None:
    """Engines that were stopped before the first token sent such groups; the journal would send them again."""
    policy = bigram()
    run = config(rollout={"group_size": 2}, learner={"minibatches": 2})
    groups = groups_by(policy.completion_logprobs, lengths=lengths)
    result = Trainer(policy, run).step(groups, version=0)  # type: ignore[arg-type]
    assert not policy.gradients[0].any()
    assert all(math.isfinite(value) for value in result.metrics.values())
    assert [fresh.count for fresh in result.fresh_by_group] == [sum(each) for each in lengths]


def test_a_gradient_that_is_no_number_shows_in_the_norm_whenever_it_came() -> None:
    policy = bigram()
    groups = groups_by(policy.completion_logprobs)
    policy.step = iter([1.0, math.nan]).__next__  # type: ignore[method-assign]
    result = Trainer(policy, config(learner={"epochs": 2})).step(groups, version=0)  # type: ignore[arg-type]
    assert math.isnan(result.metrics["optim/grad_norm"])
