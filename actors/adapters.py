"""The LoRA adapters of a run's versions inside vLLM: each version is an adapter of its own, loaded beside the others.

So a running request ends under the version it began with, and nothing pauses for the next one.
"""

import asyncio
import contextlib
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM

from lambdapo_async.config import RunConfig
from lambdapo_async.config.learner import LoraConfig
from lambdapo_async.errors import EngineError
from lambdapo_async.weights.adapter import adapter_settings, is_adapter

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Those that vLLM reserves memory for; a smaller one fits into the next."""


def lora_options(config: RunConfig) -> Mapping[str, bool | int]:
    """What vLLM's engine must be told for the run's adapters; nothing without."""
    lora = config.learner.lora
    if lora is None:
        return {}
    # Admission lets groups of that many versions run at once; of more, the newest would wait for a free place.
    num_versions = config.staleness.max_staleness + 2
    rank = min(rank for rank in _RANKS if rank >= lora.rank)
    return {"enable_lora": True, "max_lora_rank": rank, "max_loras": num_versions, "max_cpu_loras": num_versions}


class AdapterVersions:
    """The versions that requests run under; empty for ever in a run that trains all weights."""

    def __init__(self, llm: AsyncLLM, lora: LoraConfig | None, *, model_dir: Path, folder: Path) -> None:
        """``folder`` gets a small folder per version, for as long as a request may ask vLLM to read it again."""
        self._llm, self._lora = llm, lora
        self._model_dir, self._folder = model_dir, folder
        self._newest: LoRARequest | None = None
        self._users = Counter[LoRARequest]()

    @property
    def is_used(self) -> bool:
        """Whether the run trains adapters."""
        return self._lora is not None

    @contextlib.contextmanager
    def newest(self) -> Iterator[LoRARequest | None]:
        """What a request runs under from its first token to its last; None is the model without an adapter."""
        adapter = self._newest
        if adapter is None:
            yield None
            return
        self._users[adapter] += 1
        try:
            yield adapter
        finally:
            self._users[adapter] -= 1

    async def load(self, version: int, path: Path) -> float:
        """Have later requests run under the adapters in the safetensors file at ``path``, validated before.

        Returns:
            Seconds that the engine may have been busy with it.
        """
        if self._lora is None:
            return 0.0
        folder = self._folder / f"adapter-{version}"
        await asyncio.to_thread(self._write, folder, path, self._lora)
        adapter = LoRARequest(folder.name, version + 1, str(folder))  # vLLM's ids begin with 1
        started = time.monotonic()
        if not await self._llm.add_lora(adapter):
            raise EngineError(f"vLLM did not take the adapters of version {version}")
        busy_s = time.monotonic() - started
        self._forget_unused()
        self._newest = adapter
        self._users[adapter] += 0
        return busy_s

    def _write(self, folder: Path, path: Path, lora: LoraConfig) -> None:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys() if is_adapter(name)}  # noqa: SIM118
        folder.mkdir()
        (folder / "adapter_config.json").write_bytes(adapter_settings(tensors, lora, base=str(self._model_dir)))
        save_file(tensors, folder / "adapter_model.safetensors")

    def _forget_unused(self) -> None:
        """vLLM drops the oldest by itself; here go the files of those that nobody runs under."""
        for adapter in [adapter for adapter, num_users in self._users.items() if num_users == 0]:
            del self._users[adapter]
            shutil.rmtree(adapter.path)


def version_of(adapter: LoRARequest) -> int:
    """The policy version that it is."""
    return int(adapter.lora_int_id) - 1
