"""The GPU's ceilings, attention by kernel, and the projection against what else there is.

python -m benchmarks.gpu_kernels [--attention | --rivals] [--tiny]
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.attention import available_backends
from benchmarks.gpu_results import Results, peak_bytes, spread, timed
from lambdapo_async.packed_layout import PackedLayout, Segment, packed_layout
from learner.attention_kernels import Backend, Scores, sdpa_attention
from learner.model_loading import autocast
from learner.projection import CHUNK_LOGITS, KEPT_LOGITS, project

GIB = 2**30
MIXED = (3000, 1800, 1200, 900, 600, 400, 200, 92)
"""Documents of 8,192 tokens together."""
QUERY_HEADS, KEY_HEADS, HEAD_SIZE = 16, 8, 128


def layouts(scale: int) -> dict[str, PackedLayout]:
    """8,192 tokens as one document, as several, and as completions of one prompt."""
    documents = [Segment(each // scale) for each in MIXED]
    prompt = Segment(512 // scale)
    completions = [Segment(960 // scale, range(prompt.length)) for _ in range(8)]
    return {
        "one document": packed_layout([Segment(8192 // scale)]),
        "documents": packed_layout(documents),
        "shared prompt": packed_layout([prompt, *completions]),
    }


def states(num_tokens: int, device: torch.device) -> list[Tensor]:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    heads = (QUERY_HEADS, KEY_HEADS, KEY_HEADS)
    return [torch.randn(num_tokens, count, HEAD_SIZE, device=device, dtype=dtype).requires_grad_() for count in heads]


def forward_backward(backend: Backend, layout: PackedLayout, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    query, key, value = inputs
    output = backend.kernel(query, key, value, layout, Scores(HEAD_SIZE**-0.5))
    return output, *torch.autograd.grad(output, inputs, torch.ones_like(output))


def measure_attention(results: Results, device: torch.device, scale: int) -> None:
    """10^12 FLOP/s of forward and backward together, and the distance from SDPA in float32."""
    sdpa = Backend("lambdapo_sdpa", sdpa_attention, softcap=False)
    backends = available_backends() if device.type == "cuda" else [sdpa]
    for name, host_layout in layouts(scale).items():
        layout = host_layout.to(device)
        inputs = states(layout.num_tokens, device)
        exact = forward_backward(sdpa, layout, [each.detach().float().requires_grad_() for each in inputs])
        flops = 6 * QUERY_HEADS * HEAD_SIZE * host_layout.squares
        for backend in backends:
            run = partial(forward_backward, backend, layout, inputs)
            seconds = timed(run, device, warm_up=3, repeats=10)
            found = run()
            distances = [
                float((one.float() - other).norm() / other.norm()) for one, other in zip(found, exact, strict=True)
            ]
            entry = {
                "tflops": spread([flops / each / 1e12 for each in seconds]),
                "relative distance of output, dq, dk, dv": [float(f"{each:.3g}") for each in distances],
            }
            results.add(f"attention / {name} / {backend.name}", entry)


Projection = Callable[[Tensor, Tensor, Tensor], Tensor]
"""hidden [S, E] in the compute type, weight [V, E] float32, target [S] -> log-probabilities [S]."""


def ours(hidden_SE: Tensor, weight_VE: Tensor, target_S: Tensor, *, kept_logits: int = 0) -> Tensor:
    head = nn.Linear(weight_VE.shape[1], weight_VE.shape[0], bias=False, device="meta")
    head.weight = weight_VE  # type: ignore[assignment]
    with autocast(hidden_SE.device):
        chunk = CHUNK_LOGITS[hidden_SE.device.type]
        return project(head, hidden_SE, target_S, temperature=1.0, chunk_logits=chunk, kept_logits=kept_logits)[0]


def naive(hidden_SE: Tensor, weight_VE: Tensor, target_S: Tensor) -> Tensor:
    """Float32 logits kept once by autograd: the best that plain torch does."""
    logits_SV = hidden_SE @ weight_VE.to(hidden_SE.dtype).T
    return -functional.cross_entropy(logits_SV.float(), target_S, reduction="none")


def cut_cross_entropy(hidden_SE: Tensor, weight_VE: Tensor, target_S: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy  # type: ignore[import-not-found, unused-ignore]

    loss_S: Tensor = linear_cross_entropy(hidden_SE, weight_VE.to(hidden_SE.dtype), target_S, reduction="none")
    return -loss_S


def liger(hidden_SE: Tensor, weight_VE: Tensor, target_S: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import (  # type: ignore[import-not-found, unused-ignore]
        liger_fused_linear_cross_entropy,
    )

    loss_S: Tensor = liger_fused_linear_cross_entropy(
        hidden_SE, weight_VE.to(hidden_SE.dtype), target_S, reduction="none"
    )
    return -loss_S


def measure_projection(
    results: Results, name: str, projection: Projection, device: torch.device, *, tokens: int, vocabulary: int
) -> None:
    """Peak above the inputs, seconds of forward and backward, distance from float32 on a few rows."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden_SE = torch.randn(tokens, 1024, device=device, dtype=dtype).requires_grad_()
    weight_VE = nn.Parameter(torch.randn(vocabulary, 1024, device=device) * 0.02)
    target_S = torch.randint(vocabulary, (tokens,), device=device)
    upstream_S = torch.randn(tokens, device=device)

    def run() -> tuple[Tensor, ...]:
        logprobs_S = projection(hidden_SE, weight_VE, target_S)
        return logprobs_S.detach(), *torch.autograd.grad(logprobs_S, [hidden_SE, weight_VE], upstream_S.to(logprobs_S))

    key = f"projection / {tokens} tokens / {name}"
    try:
        peak = peak_bytes(run, device)
        seconds = timed(run, device, warm_up=1, repeats=4)
        logprobs_S, grad_hidden_SE, _ = run()
    except torch.OutOfMemoryError:
        results.add(key, "out of memory")
        return
    rows = slice(0, min(tokens, 256))
    exact = hidden_SE[rows].detach().float().requires_grad_()
    exact_S = naive(exact, weight_VE, target_S[rows])
    (exact_grad,) = torch.autograd.grad(exact_S, [exact], upstream_S[rows])
    entry = {
        "peak_gib": round(peak / GIB, 3),
        "ms": spread([1e3 * each for each in seconds]),
        "logprob_error": float((logprobs_S[rows] - exact_S).abs().mean()),
        "grad_hidden_error": float((grad_hidden_SE[rows].float() - exact_grad).norm() / exact_grad.norm()),
    }
    results.add(key, entry)


def measure_ceilings(results: Results, device: torch.device, size: int) -> None:
    """What the matrix units and the memory of this card give to plain torch."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = timed(lambda: a @ b, device, warm_up=3, repeats=10)
    results.add("matrix product, 10^12 FLOP/s", spread([2 * size**3 / each / 1e12 for each in seconds]))
    source = torch.randn(size * size * 4, device=device)
    target = torch.empty_like(source)
    seconds = timed(lambda: target.copy_(source), device, warm_up=3, repeats=10)
    results.add("copy, 10^12 bytes/s", spread([2 * source.nbytes / each / 1e12 for each in seconds]))


def main(attention: bool = False, rivals: bool = False, tiny: bool = False) -> None:
    """All but the rivals; or one part alone."""
    results, device = Results(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measure = partial(measure_projection, results, device=device, vocabulary=2048 if tiny else 151_936)
    sizes = (64,) if tiny else (8_192, 32_768)
    if rivals:
        for tokens in sizes:
            for name, projection in (("cut-cross-entropy", cut_cross_entropy), ("liger", liger)):
                measure(name, projection, tokens=tokens)
        return
    if not attention:
        measure_ceilings(results, device, 256 if tiny else 8192)
        for tokens in sizes:
            measure("ours", ours, tokens=tokens)
            measure("ours, logits kept", partial(ours, kept_logits=KEPT_LOGITS[device.type]), tokens=tokens)
        for tokens in sizes:
            measure("naive", naive, tokens=tokens)
    measure_attention(results, device, 32 if tiny else 1)


if __name__ == "__main__":
    typer.run(main)
