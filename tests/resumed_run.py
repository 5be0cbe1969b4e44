"""What a run left on disk, compared to the bit with what an uninterrupted replay of its journal leaves."""

import hashlib
from pathlib import Path

from safetensors.torch import load_file

from lambdapo_async.metrics import STEP
from learner.checkpoint import Checkpoint, CheckpointStore
from tests.learner_stage import rows_of


def newest(folder: Path) -> Checkpoint:
    found = CheckpointStore(folder / "checkpoints").load_latest()
    assert found is not None
    return found


def fingerprint(folder: Path) -> dict[str, str]:
    """Weights and moments, to the bit."""
    checkpoint = newest(folder)
    tensors = {
        f"{part}/{name}": tensor
        for part in ("model", "optimizer")
        for path in sorted((checkpoint.folder / part).glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    assert any(name.startswith("optimizer/exp_avg_sq") for name in tensors)
    return {name: hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}


def losses(folder: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of every step."""
    return [(row.step, row.values["loss/policy"], row.values["optim/grad_norm"]) for row in rows_of(folder, STEP)]


def assert_same_bits(folder: Path, uninterrupted: Path, *, num_steps: int) -> None:
    assert [step for step, _, _ in losses(folder)] == list(range(1, num_steps + 1))
    assert losses(folder) == losses(uninterrupted)
    assert fingerprint(folder) == fingerprint(uninterrupted)
    assert newest(folder).state.pool == newest(uninterrupted).state.pool
