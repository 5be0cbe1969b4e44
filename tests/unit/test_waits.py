"""Between the step's start and its end no micro-batch makes the host wait for the device."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lambdapo_async.config import RunConfig
from lambdapo_async.objective.presets import PRESETS
from lambdapo_async.packing import MicroBatch
from learner.policy import Policy
from learner.trainer import Trainer
from tests.random_groups import received_groups
from tests.tiny_models import VOCAB, tiny_model_folder

WAITING = frozenset(
    {"_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "unique_consecutive", "masked_select", "equal"}
    | {"bincount", "is_nonzero", "repeat_interleave"}
)
"""Operators whose result, or its size, is read back from a GPU."""


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Names of the operators that would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Iterable[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        name = func.overloadpacket.__name__
        if name in WAITING or (name.startswith("index") and _has_mask(args)):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def _has_mask(args: Sequence[object]) -> bool:
    indices = [each for arg in args if isinstance(arg, list | tuple) for each in arg]
    return any(isinstance(each, Tensor) and each.dtype == torch.bool for each in indices)


@pytest.mark.parametrize(
    "wait",
    [lambda x: x[x > 0], lambda x: x.sum().item(), torch.unique, torch.nonzero, lambda x: bool(x.any())],
    ids=["mask", "item", "unique", "nonzero", "bool"],
)
def test_waiting_is_noticed(wait: object) -> None:
    with Waits() as waits:
        wait(torch.ones(3))  # type: ignore[operator]
    assert waits.found


@pytest.mark.parametrize("preset", [*PRESETS, "regularised"])
def test_a_micro_batch_waits_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str) -> None:
    config = _config(preset)
    policy = Policy.load(
        tiny_model_folder(tmp_path),
        revision=None,
        config=config.learner,
        temperature=1.0,
        device=torch.device("cpu"),
    )
    waits, own, batches = Waits(), Trainer._backward, []

    def watched(self: Trainer, *args: object) -> None:
        batches.append(args)
        with waits:
            own(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "_backward", watched)
    groups = received_groups(0, config, vocab=VOCAB, version=0)
    Trainer(policy, config, _reference).step(groups, version=1)
    assert len(batches) > 1
    assert waits.found == []


def _config(preset: str) -> RunConfig:
    objective: dict[str, object] = {"policy_loss": {"preset": preset}}
    if preset == "regularised":
        objective = {"kl": {"coefficient": 0.1}, "entropy_coefficient": 0.1}
    return RunConfig.model_validate(
        {
            "model": {"path": "unused", "max_length": 64},
            "task": {"kind": "arithmetic"},
            "sampling": {"max_tokens": 16},
            "rollout": {"group_size": 4, "groups_per_step": 4},
            "learner": {"micro_batch_tokens": 64},
            "objective": objective,
        }
    )


def _reference(micro_batch: MicroBatch) -> Tensor:
    return torch.full_like(micro_batch.behavior_logprobs_T, -1.0)
