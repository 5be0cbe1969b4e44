"""The random state of the process, as data."""

import random
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RandomState:
    """Where torch's, numpy's and Python's global generators stand."""

    tensors: dict[str, Tensor]
    """uint8 states of torch's CPU and CUDA generators."""
    python: list[object]
    """``random.getstate`` as JSON: version, integers, next normal number."""
    numpy: dict[str, object]
    """``numpy.random.get_state`` as JSON."""

    @classmethod
    def capture(cls) -> Self:
        """The state now."""
        tensors = {"rng:cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            tensors["rng:cuda"] = torch.cuda.get_rng_state()
        version, integers, gauss = random.getstate()
        legacy = np.random.get_state(legacy=False)
        assert isinstance(legacy, dict)
        keys = [int(key) for key in legacy["state"]["key"]]
        state = {**legacy, "state": {"key": keys, "pos": int(legacy["state"]["pos"])}}
        return cls(tensors, [version, list(integers), gauss], state)

    def restore(self) -> None:
        """Go on from this state; a CUDA state is left alone on a machine without CUDA."""
        torch.set_rng_state(self.tensors["rng:cpu"])
        if torch.cuda.is_available() and "rng:cuda" in self.tensors:
            torch.cuda.set_rng_state(self.tensors["rng:cuda"])
        version, integers, gauss = self.python
        random.setstate((version, tuple(integers), gauss))  # type: ignore[arg-type]
        np.random.set_state(self.numpy)
