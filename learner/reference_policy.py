"""The frozen policy that the KL term measures the distance to (docs/algorithm.md, section 2)."""

import logging
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lambdapo_async.packing import MicroBatch
from learner.logprobs import LogprobModel
from learner.model_folder import ModelSource
from learner.model_loading import autocast, load_frozen_model
from learner.parallel import ALONE, Ranks
from learner.sharding import shard

logger = logging.getLogger(__name__)


class ReferencePolicy:
    """A model without optimizer; with several ranks each holds a slice of every parameter, as of the policy's.

    Load it before the policy: what it takes is then no longer free when the policy's memory plan is checked.
    """

    def __init__(self, model: PreTrainedModel, *, temperature: float, device: torch.device, ranks: Ranks) -> None:
        self._forward = LogprobModel(model, temperature=temperature, context=ranks.context)
        # Ranks run it as they run the policy; on one GPU neither has anything to cast.
        self._device, self._casts = device, not ranks.is_alone
        shard(self._forward, model, ranks)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        revision: str | None,
        temperature: float,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> Self:
        """Load a folder or repo id in Hugging Face's format; a LoRA adapter's is merged.

        Args:
            path: ``model.path``, of a resumed run too: the reference is where the run began.
            temperature: ``sampling.temperature``, as of the policy.

        Raises:
            ConfigError: no such model, or one that cannot be run on packed sequences.
        """
        model = load_frozen_model(ModelSource.locate(str(path), revision), device, ranks)
        num_bytes = sum(parameter.nbytes for parameter in model.parameters()) // ranks.world_size
        logger.info("reference policy: %.2f GiB of weights", num_bytes / 2**30)
        return cls(model, temperature=temperature, device=device, ranks=ranks)

    @torch.no_grad()
    def logprobs(self, micro_batch: MicroBatch) -> Tensor:
        """[T] float32 log-probabilities, 0 where there is no loss; on all ranks together."""
        with autocast(self._device, is_on=self._casts):
            logprobs_T: Tensor = self._forward(micro_batch)[0]
        return logprobs_T
