"""Two successive versions: of a small model that really trains, or of a large one's shape."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from math import prod
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, set_seed

from benchmarks.machine import ROOT
from benchmarks.model_shapes import ModelShape
from lambdapo_async.weights.state import State
from lambdapo_async.weights.tensor_file import BitTensor

LEARNING_RATES = (1e-6, 5e-6, 1e-5, 1e-4)
SHARE_AT_1E6 = 0.01
"""Changed elements of a shaped state: a little more than what the trained model shows at lr 1e-6."""
BLOCK = 2**22
PEAK_LR, SETTLE = 1e-3, 20
"""Of the warm-up, which ends at 0; and updates at each rate before the one that counts, for Adam's moments to be of it.

A model that has hardly learned has gradients that agree from step to step, and changes more of its elements."""
VOCAB = 8192
BATCH, LENGTH = 4, 64


def trained_updates(warm_up: int, folder: Path) -> dict[float, tuple[State, State]]:
    """Learning rate -> bfloat16 weights before and after one AdamW step at it.

    A 14M Qwen3-style model with float32 masters learns to continue this repository's own documents; the result is kept
    in ``folder``.
    """
    path = folder / f"weights-14m-{warm_up}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(dict(_train(warm_up)), partial)
        partial.rename(path)
    found = load_file(path)
    return {lr: (_state(1, found, f"{lr:g}/old/"), _state(2, found, f"{lr:g}/new/")) for lr in LEARNING_RATES}


def _state(version: int, tensors: Mapping[str, Tensor], prefix: str) -> State:
    chosen = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return State.of_torch(version, chosen)


def build_model() -> PreTrainedModel:
    """14M parameters, float32, the same at every call."""
    set_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=7,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=48,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _train(warm_up: int) -> Iterator[tuple[str, Tensor]]:
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.0)
    tokens = document_tokens()
    for step in range(warm_up):
        _set_lr(optimizer, PEAK_LR * (1 - step / warm_up))
        loss = take_step(model, optimizer, tokens)
        if step % 50 == 0:
            print(f"training the 14M model: step {step} of {warm_up}, loss {loss:.2f}", flush=True)
    for lr in LEARNING_RATES:
        _set_lr(optimizer, lr)
        for _ in range(SETTLE):
            take_step(model, optimizer, tokens)
        for which in ("old", "new"):
            for name, parameter in model.named_parameters():
                yield f"{lr:g}/{which}/{name}", parameter.detach().bfloat16()
            take_step(model, optimizer, tokens)


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def document_tokens() -> Tensor:
    """This repository's documents, two letters to a token."""
    data = b"".join(path.read_bytes() for path in sorted((ROOT / "docs").rglob("*.md")))
    pairs_of_letters = np.frombuffer(data[: len(data) // 2 * 2], np.uint16).astype(np.int64)
    return torch.from_numpy(pairs_of_letters % VOCAB)


def take_step(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    tokens: Tensor,
    *,
    batch: int = BATCH,
    length: int = LENGTH,
) -> float:
    """One update on ``batch`` passages of ``length`` tokens; returns the loss in nats per token."""
    starts = torch.randint(len(tokens) - length - 1, (batch,))
    ids = torch.stack([tokens[start : start + length + 1] for start in starts])
    optimizer.zero_grad()
    logits = model(ids[:, :-1]).logits
    loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def shaped_update(shape: ModelShape) -> tuple[State, State]:
    """Normal bfloat16 weights and one step of +-1 patterns in ``SHARE_AT_1E6`` of them."""
    rng = np.random.default_rng(0)
    block = (rng.normal(0.0, 0.02, BLOCK).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    old = State(1, {})
    for name, tensor_shape in _parameter_shapes(shape).items():
        start = int(rng.integers(BLOCK))
        end = start + prod(tensor_shape)
        bits = np.tile(block, -(-end // BLOCK))[start:end]
        old.put(name, BitTensor("BF16", tensor_shape, bits))
    new = old.copy()
    new.version = 2
    for tensor in new.tensors.values():
        gaps = rng.geometric(SHARE_AT_1E6, int(1.2 * SHARE_AT_1E6 * tensor.bits.size) + 8)
        at = np.cumsum(gaps)
        at = at[at < tensor.bits.size]
        tensor.bits[at] += rng.choice(np.array([1, 0xFFFF], np.uint16), at.size)
    return old, new


def _parameter_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen3Config(**asdict(shape)))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def num_parameters(shape: ModelShape) -> int:
    """Elements of all tensors, tied ones once."""
    return sum(prod(each) for each in _parameter_shapes(shape).values())
