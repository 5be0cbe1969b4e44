"""The learner's own step: advantages, packing, forward, backward, diagnostics, update."""

from benchmarks.peers.interface import Setting
from benchmarks.workload import Workload
from learner.policy import Policy
from learner.trainer import Trainer


class Ours:
    """``learner.trainer.Trainer`` over ``learner.policy.Policy``, as a run uses them."""

    def __init__(self, setting: Setting) -> None:
        policy = Policy.load(
            setting.model_dir,
            revision=None,
            config=setting.config.learner,
            temperature=setting.config.sampling.temperature,
            device=setting.device,
        )
        self._trainer = Trainer(policy, setting.config)
        self._budget = setting.config.learner.micro_batch_tokens

    def step(self, workload: Workload) -> float:
        """One whole ``Trainer.step``."""
        return self._trainer.step(workload.groups, version=0).metrics["optim/grad_norm"]

    def num_slots(self, workload: Workload) -> int:
        """No padding, and prompts only once."""
        return workload.packed_tokens(self._budget)
