"""Attention over packed segments, as its definition reads."""

from itertools import pairwise

import torch
from torch import Tensor

from lambdapo_async.packed_layout import PackedLayout
from learner.attention_kernels import Scores


def naive_attention(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scores: Scores) -> Tensor:
    """One segment, one head, one query at a time."""
    share = query.shape[1] // key.shape[1]
    output = value.new_zeros(*query.shape[:2], value.shape[2])
    tokens_K = torch.arange(layout.num_tokens) if layout.shared is None else layout.shared.index_K
    bounds = zip(pairwise(layout.cu_seqlens.tolist()), pairwise(layout.key_marks.tolist()), strict=True)
    for (begin, end), (first, last) in bounds:
        for t in range(begin, end):
            seen = tokens_K[first : last - end + t + 1]
            seen = seen if scores.window is None else seen[-scores.window :]
            for head in range(query.shape[1]):
                score = key[seen, head // share] @ query[t, head] * scores.scale
                if scores.softcap is not None:
                    score = scores.softcap * (score / scores.softcap).tanh()
                output[t, head] = score.softmax(0) @ value[seen, head // share]
    return output
