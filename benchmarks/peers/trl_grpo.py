"""TRL's GRPO loss step: ``GRPOTrainer.compute_loss``, backward, clip, AdamW, on batches made as TRL makes them.

``_generate_and_score_completions`` pads the prompts of a whole step on the left and its completions on the right,
shuffles the rows and splits them into micro-batches of equal size; that is done here with TRL's own functions. Left out
in TRL's favour: generation, rewards, advantages, and in :class:`TrlGrpo` the forward pass for the old log-probabilities
that it takes when vLLM samples; :class:`TrlGrpoFromVllm` has it. Settings that are faster than the defaults here: no
gradient checkpointing, float32 on a CPU, fused AdamW, micro-batches as large as the token budget allows.
docs/benchmarks.md says what else was looked at.
"""

import tempfile
import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.peers.interface import Setting
from benchmarks.peers.plain_loop import RATIO_CAP
from benchmarks.workload import Workload


class TrlGrpo:
    """A ``GRPOTrainer`` whose data loop is replaced by ours, its loss and optimizer untouched."""

    def __init__(self, setting: Setting) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on versions of vLLM, which is not used
            from trl import GRPOTrainer  # type: ignore[import-not-found, unused-ignore]

        self._setting = setting
        self._folder = tempfile.TemporaryDirectory(prefix="trl-")
        self._trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(setting.model_dir, dtype=torch.float32),
            reward_funcs=_no_reward,
            args=_arguments(setting, self._folder.name),
            train_dataset=_unused_dataset(),
            processing_class=AutoTokenizer.from_pretrained(setting.model_dir),
        )
        self._trainer.model.train()
        self._trainer.create_optimizer()
        # Outside Trainer.train nobody sets it; the loss is divided by the step's tokens as a whole.
        self._trainer.current_gradient_accumulation_steps = self._trainer.args.steps_per_generation

    def step(self, workload: Workload) -> float:
        """One optimizer step."""
        trainer = self._trainer
        for inputs in self._micro_batches(workload):
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(trainer.model, inputs)
            trainer.accelerator.backward(loss)
        max_norm = self._setting.config.learner.max_grad_norm
        grad_norm = float(trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), max_norm))
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return grad_norm

    def num_slots(self, workload: Workload) -> int:
        """Every row is as long as the longest prompt and the longest completion of the step."""
        prompts, completions = _split_lengths(workload)
        return len(prompts) * (max(prompts) + max(completions))

    def _micro_batches(self, workload: Workload) -> list[dict[str, Any]]:
        """The batch of a step, shuffled and split as TRL does."""
        from trl.trainer.utils import (  # type: ignore[import-not-found, unused-ignore]
            shuffle_sequence_dict,
            split_tensor_dict,
        )

        batch = shuffle_sequence_dict(self._batch(workload))
        return split_tensor_dict(batch, self._num_micro_batches(workload))  # type: ignore[no-any-return]

    def _batch(self, workload: Workload) -> dict[str, Any]:
        """All rows of a step."""
        from trl.trainer.utils import pad  # type: ignore[import-not-found, unused-ignore]

        def padded(columns: list[NDArray[Any]], side: str) -> Tensor:
            padded_BL: Tensor = pad([torch.from_numpy(column) for column in columns], padding_side=side)
            return padded_BL.to(self._setting.device)

        sequences = workload.sequences
        prompts = [sequence.token_ids[~sequence.loss_mask].astype(np.int64) for sequence in sequences]
        completions = [sequence.token_ids[sequence.loss_mask].astype(np.int64) for sequence in sequences]
        return {
            "prompt_ids": padded(prompts, "left"),
            "prompt_mask": padded([np.ones_like(prompt) for prompt in prompts], "left"),
            "completion_ids": padded(completions, "right"),
            "completion_mask": padded([np.ones_like(completion) for completion in completions], "right"),
            "advantages": torch.tensor([one.advantage for one in sequences], device=self._setting.device),
            "old_per_token_logps": padded([one.behavior_logprobs[one.loss_mask] for one in sequences], "right"),
            "num_items_in_batch": torch.tensor(workload.num_loss_tokens, device=self._setting.device),
        }

    def _num_micro_batches(self, workload: Workload) -> int:
        """The fewest of equal size within the token budget; one row each where not even two fit."""
        num_rows, budget = len(workload.sequences), self._setting.config.learner.micro_batch_tokens
        fitting = (
            number
            for number in range(1, num_rows + 1)
            if num_rows % number == 0 and self.num_slots(workload) <= number * budget
        )
        return next(fitting, num_rows)


class TrlGrpoFromVllm(TrlGrpo):
    """The same with vLLM's samples: old log-probabilities by TRL's own forward pass, vLLM's for its correction.

    As in ``_generate_and_score_completions`` with ``vllm_importance_sampling_correction``, which is on by default: over
    all rows, padded to the longest of the step, as many at a time as a micro-batch has, before they are shuffled. The
    weight of pi_old over mu is truncated at our cap (``token_truncate``), so that the gradient stays ours.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._trainer.use_vllm = True  # not in the settings, which would start vLLM

    def _batch(self, workload: Workload) -> dict[str, Any]:
        batch = super()._batch(workload)
        behavior_BC = batch.pop("old_per_token_logps")
        prompt_mask, completion_mask = batch["prompt_mask"], batch["completion_mask"]
        with torch.no_grad():
            old_BC, _, _ = self._trainer._get_per_token_logps_and_entropies(
                self._trainer.model,
                torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
                torch.cat([prompt_mask, completion_mask], dim=1),
                completion_mask.shape[1],
                batch_size=len(completion_mask) // self._num_micro_batches(workload),
            )
        weights_BC = ((old_BC - behavior_BC) * completion_mask).exp().clamp(max=RATIO_CAP)
        corrected = {"sampling_per_token_logps": behavior_BC, "importance_sampling_ratio": weights_BC}
        return {**batch, "old_per_token_logps": old_BC, **corrected}


def _arguments(setting: Setting, folder: str) -> Any:
    from trl import GRPOConfig  # type: ignore[import-not-found, unused-ignore]

    learner, on_cpu = setting.config.learner, setting.device.type == "cpu"
    return GRPOConfig(
        output_dir=folder,
        use_cpu=on_cpu,
        bf16=not on_cpu,
        gradient_checkpointing=False,
        optim="adamw_torch_fused",
        learning_rate=learner.lr,
        adam_beta1=learner.betas[0],
        adam_beta2=learner.betas[1],
        weight_decay=learner.weight_decay,
        max_grad_norm=learner.max_grad_norm,
        per_device_train_batch_size=2,
        num_generations=2,
        temperature=setting.config.sampling.temperature,
        loss_type="cispo",
        epsilon_high=RATIO_CAP,
        beta=0.0,
        report_to="none",
        disable_tqdm=True,
    )


def _unused_dataset() -> Any:
    from datasets import Dataset  # type: ignore[import-not-found, unused-ignore]

    return Dataset.from_dict({"prompt": ["1+1="] * 2})


def _no_reward(completions: list[str], **_: object) -> list[float]:
    return [0.0] * len(completions)


def _split_lengths(workload: Workload) -> tuple[list[int], list[int]]:
    masks = [sequence.loss_mask for sequence in workload.sequences]
    return [int((~mask).sum()) for mask in masks], [int(mask.sum()) for mask in masks]
