"""Packed causal attention behind one name of transformers' attention interface.

T packed tokens, H query heads, H_kv key and value heads, D head size. A model runs unpatched with ``input_ids``
[1, T], ``position_ids`` [1, T] that restart per rollout, and ``layout=PackedLayout(...)``, which transformers hands
down to every attention layer.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface

from lambdapo_async.errors import UserError
from lambdapo_async.packed_layout import PackedLayout
from learner.attention_kernels import Backend, Scores, choose_backend
from learner.context_parallel import sharded_backend


def select_attention(device: torch.device, context: dist.ProcessGroup | None = None) -> str:
    """Register the best kernel for ``device``; returns the name for ``attn_implementation``.

    A CUDA device takes the newest flash-attn package that runs on it (a broken installation raises its own
    ImportError), else torch's varlen kernel; a CPU, or a GPU older than Ampere, takes SDPA document by document.
    Ranks of ``context`` each hold a part of the tokens.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    backend = choose_backend(capability)
    return register_attention(backend if context is None else sharded_backend(backend, context))


def register_attention(backend: Backend) -> str:
    """Make ``backend`` known to transformers; returns its name."""
    AttentionInterface.register(backend.name, partial(_attention_layer, backend))
    return backend.name


def _attention_layer(  # noqa: PLR0913 - the signature is transformers'
    backend: Backend,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: PackedLayout | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """One layer's attention as transformers calls it: query [1, H, T, D] -> [1, T, H, D].

    transformers passes more keywords (dropout, position ids, output switches), none of which changes the
    result of a model in evaluation mode; those that would are refused.
    """
    if layout is None:
        raise UserError(
            f"{type(module).__name__} is not told which tokens are packed together, for its model passes nothing down: "
            "choose another model"
        )
    if s_aux is not None or attention_mask is not None:
        raise UserError(
            f"{type(module).__name__} needs a mask or attention sinks, which packed training does not support: "
            "choose a model with plain causal attention"
        )
    if softcap is not None and not backend.softcap:
        raise UserError(
            f"{type(module).__name__} caps its attention scores at {softcap}, which {backend.name} cannot: "
            "train on a GPU with flash-attn installed, or choose a model without soft cap"
        )
    window = sliding_window if sliding_window is not None and sliding_window < layout.max_keys else None
    scores = Scores(query.shape[-1] ** -0.5 if scaling is None else scaling, window, softcap)
    # Under autocast a norm with float32 weights leaves query and key in float32; the kernels want one type.
    query_THD, key_THD, value_THD = (states[0].transpose(0, 1).to(value.dtype) for states in (query, key, value))
    return _with_equal_head_sizes(backend, query_THD, key_THD, value_THD, layout, scores).unsqueeze(0), None


def _with_equal_head_sizes(
    backend: Backend, query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scores: Scores
) -> Tensor:
    """Zeros widen values narrower than the keys (multi-head latent attention): most kernels know one head size."""
    size, value_size = query.shape[-1], value.shape[-1]
    if size == value_size or (size, value_size) == backend.narrow:
        return backend.kernel(query, key, value, layout, scores)
    return backend.kernel(query, key, functional.pad(value, (0, size - value_size)), layout, scores)[..., :value_size]
