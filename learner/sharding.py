"""One model over many ranks with FSDP2: each keeps a slice of every parameter, gradients are added up.

The loss of a step has one denominator for all its tokens, wherever they are trained, so ranks add their gradients
where FSDP would average them. A model is whole nowhere: a layer is gathered for its forward and backward pass, a
parameter for a checkpoint or a publication.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from learner.parallel import Ranks


def shard(module: nn.Module, model: PreTrainedModel, ranks: Ranks) -> None:
    """Slice the parameters of ``module`` over the ranks, in place; nothing happens to a process alone.

    Decoder layers are gathered one by one. Embeddings, last norm and output layer, which may be tied, belong to
    ``module`` and are gathered while its ``forward`` runs: nothing else may use them. Every rank must run the same
    number of forward and backward passes.

    Args:
        module: holds ``model``; its ``forward`` is what is trained. Parameters may still be on the CPU: a layer
            goes to the rank's device when it is sliced, so the device never holds the model.
        model: says which of its modules are layers.
    """
    if ranks.mesh is None:
        return
    on_gpu = ranks.mesh.device_type == "cuda"
    precision = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if on_gpu else None,
        reduce_dtype=torch.float32 if on_gpu else None,
        # Inputs hold log-probabilities and packing layouts: no business of FSDP.
        cast_forward_inputs=False,
    )
    layers = [child for child in model.modules() if type(child).__name__ in (model._no_split_modules or ())]
    for unit in (*layers, module):
        # The root is gathered again for the backward pass: kept from a forward pass without one, it would be stale.
        sharded = fully_shard(unit, mesh=ranks.mesh, mp_policy=precision, reshard_after_forward=True)
        assert isinstance(sharded, FSDPModule)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo knows no other, NCCL's scaled sums had bugs
        sharded.set_gradient_divide_factor(1.0)


def full_tensors(tensors: Iterable[tuple[str, Tensor]], ranks: Ranks) -> Iterator[tuple[str, Tensor]]:
    """On all ranks: gather one tensor after the other; rank 0 gets each whole on the CPU, the others get nothing.

    Every rank must run it to its end. At most one whole tensor is on the device.
    """
    for name, tensor in tensors:
        whole = whole_tensor(tensor.detach())
        if ranks.is_main:
            yield name, whole.cpu()


def whole_tensor(tensor: Tensor) -> Tensor:
    """On all ranks: the tensor with all its slices, on every rank; one that is not sliced is returned as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
