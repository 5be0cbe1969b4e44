"""20 steps of the CPU recipe on a tiny model, told to the last bit: ``python -m tests.golden_run`` prints JSON."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers

from lambdapo_async.config import load_config
from learner.policy import Policy
from learner.trainer import Trainer
from tests.processes import ROOT
from tests.random_groups import received_groups
from tests.tiny_models import VOCAB, tiny_model_folder

RECIPE = ROOT / "configs" / "arithmetic_demo.toml"
NUM_STEPS = 20
GROUPS_PER_STEP = 4
"""A quarter of the recipe's, for speed."""

PORTABLE = {
    "ATEN_CPU_CAPABILITY": "default",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX512F,-AVX2,-FMA,-FMA4",
    "MKL_CBWR": "COMPATIBLE",
    "OMP_NUM_THREADS": "1",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
}
"""Makes torch, its libraries and libm sum and round alike on every x86 CPU, whatever vectors it has."""


def run_portably() -> dict[str, object]:
    """:func:`train` in a process of its own, with :data:`PORTABLE` from its start; fails with what it wrote."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.golden_run"],
        cwd=ROOT,
        env={**os.environ, **PORTABLE},
        capture_output=True,
        timeout=300,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    told: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return told


def train(folder: Path) -> dict[str, object]:
    """Loss and gradient norm of each step, and what became of the weights, as text that loses no bit."""
    config = load_config(RECIPE, [f"rollout.groups_per_step={GROUPS_PER_STEP}"])
    torch.manual_seed(config.seed)
    model = tiny_model_folder(folder)
    policy = Policy.load(
        model,
        revision=None,
        config=config.learner,
        temperature=config.sampling.temperature,
        device=torch.device("cpu"),
    )
    trainer = Trainer(policy, config)
    steps = []
    for step in range(NUM_STEPS):
        # Sampled up to max_staleness versions ago, as in a run.
        sampled = max(0, step - step % (config.staleness.max_staleness + 1))
        groups = received_groups(step, config, vocab=VOCAB, version=sampled)
        metrics = trainer.step(groups, version=step).metrics
        steps.append({name: metrics[name].hex() for name in ("loss/policy", "optim/grad_norm")})
    return {**versions(), "steps": steps, "weights_sha256": _digest(policy)}


def versions() -> dict[str, str]:
    """What decides the bits besides our code."""
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def _digest(policy: Policy) -> str:
    digest = hashlib.sha256()
    for name, master in sorted(policy.named_masters()):
        digest.update(name.encode() + master.contiguous().numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        sys.stdout.write(json.dumps(train(Path(scratch))) + "\n")
