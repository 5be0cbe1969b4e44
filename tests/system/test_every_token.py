"""Every token of a run, sampled by real vLLM actors of which one is killed, against the weights that its journal makes.

The journal says which groups each step trained on, so training again gives every version's weights, bit for bit; and
each token says which version sampled it. Its recorded log mu must be that version's, to float32's last digits.
"""

import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from lambdapo_async.rollout import Rollout, RolloutGroup
from lambdapo_async.tasks.registry import build_task
from learner.arrivals import Screen
from learner.policy import Policy
from learner.pool import Pool
from learner.replay import Recording
from learner.rerun import Rerun
from learner.starter import ensure_starter
from learner.trainer import Trainer
from tests.system.test_run import DEMO, RUN_S, Scene, learner, scene

__all__ = ["scene"]

pytestmark = [pytest.mark.system, pytest.mark.engine, pytest.mark.timeout(1000)]

OVERRIDES = ("learner.num_steps=12", "learner.record=true", "evaluation.every_steps=0")
MEAN, LARGEST = 1e-6, 1e-3
"""Nats between two implementations in float32; 6e-8 and 8e-6 were measured."""


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The learner's own number: sums of several threads have other last digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_every_token_was_sampled_by_the_version_that_it_names(scene: Scene) -> None:
    run_with_a_killed_actor(scene)
    groups, versions = trained_again(scene.folder)
    rollouts = [(group, rollout) for group in groups for rollout in group.rollouts]
    assert len(rollouts) == 12 * 16 * 8
    assert len({group.actor_id for group in groups}) == 2, "the killed actor, or the one after it, sampled nothing"
    assert any(len(rollout.version_spans) > 1 for _, rollout in rollouts), "no update came while tokens were sampled"
    gaps = np.concatenate([gap(versions, group, rollout) for group, rollout in rollouts])
    assert gaps.mean() < MEAN
    assert gaps.max() < LARGEST
    earlier = {version + 1: model for version, model in versions.items()}
    mislabelled = [gap(earlier, group, group.rollouts[0]) for group in groups if group.min_version > 0]
    assert np.concatenate(mislabelled).mean() > 1000 * MEAN, "neighbouring versions cannot be told apart"


def run_with_a_killed_actor(scene: Scene) -> None:
    """A dozen steps; what comes after the fourth is sampled by the second actor alone, or was sent before."""
    with learner(DEMO, *scene.learner_arguments(*OVERRIDES), log=scene.logs / "learner.log") as process:
        scene.wait_open(process)
        victim = scene.start_actor("victim")
        scene.wait_step(4, process)
        os.kill(victim, signal.SIGKILL)
        assert scene.nursery.wait_exit(victim) == -signal.SIGKILL
        heir = scene.start_actor("heir")
        assert process.wait(timeout_s=RUN_S) == 0, process.log_tail()
    assert scene.nursery.wait_exit(heir) == 0


def trained_again(folder: Path) -> tuple[list[RolloutGroup], dict[int, PreTrainedModel]]:
    """The groups of all steps, and the model of every version that sampled them."""
    recording = Recording.open(folder)
    config = recording.config
    path = ensure_starter(config, build_task(config))
    policy = Policy.load(path, revision=None, config=config.learner, temperature=1.0, device=torch.device("cpu"))
    trainer, screen = Trainer(policy, config), Screen(config, vocab_size=policy.vocab_size)
    groups: list[RolloutGroup] = []
    versions = {0: published(policy, path)}
    for record, batch in Rerun(Pool(config, screen), screen, on_heldout=lambda _: None).steps(
        recording.history.read(1), step=0
    ):
        groups += [received.group for received in batch.groups]
        trainer.step(batch.groups, version=batch.version)
        versions[record.version + 1] = published(policy, path)
    return groups, versions


def published(policy: Policy, path: Path) -> PreTrainedModel:
    """What actors have of the policy as it is now: bfloat16 weights, computed with in float32."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    weights = {name: weight.float() for name, weight in policy.named_bf16()}
    missing, unknown = model.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unknown
    model.tie_weights()
    return model.eval()


def gap(versions: Mapping[int, PreTrainedModel], group: RolloutGroup, rollout: Rollout) -> NDArray[np.float64]:
    """[C] |log mu recorded - log mu of the version that each token names|."""
    return np.abs(rollout.behavior_logprobs - sampled_logprobs(versions, group, rollout)).astype(np.float64)


@torch.no_grad()
def sampled_logprobs(
    versions: Mapping[int, PreTrainedModel], group: RolloutGroup, rollout: Rollout
) -> NDArray[np.float32]:
    """[C] log-probabilities as an engine has them that keeps its contexts at an update (``actor.stale_kv``).

    The keys and values of a token are those of the version that sampled the next one, for that is when it was fed.
    """
    completion = torch.from_numpy(rollout.completion_ids.astype(np.int64))
    fed, start = torch.from_numpy(group.prompt_ids.astype(np.int64)), 0
    context, found = DynamicCache(), []
    for span in rollout.version_spans:
        sampled = completion[start : start + span.num_tokens]
        inputs = torch.cat([fed, sampled[:-1]])
        logits = versions[span.policy_version](inputs[None], past_key_values=context, use_cache=True).logits[0]
        found.append(logits[-len(sampled) :].log_softmax(-1).gather(1, sampled[:, None])[:, 0])
        fed, start = sampled[-1:], start + span.num_tokens
    return torch.cat(found).numpy()
