"""The engine of production: vLLM's AsyncLLM with weights that change while requests run."""

import asyncio
import contextlib
import logging
import os
import time
import uuid
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Self

import numpy as np
import vllm
from vllm.exceptions import VLLMError
from vllm.inputs.engine import tokens_input
from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from actors.adapters import AdapterVersions, version_of
from actors.engine import Completion, EngineInfo
from actors.published_shapes import published_shapes
from actors.requests import NO_WEIGHTS, check_request
from actors.vllm_settings import coarsest_dtype, engine_args, import_model_class
from actors.weights_file import Layout, check_finite, check_names, check_same, in_layers_of, read_layout
from lambdapo_async.config import RunConfig
from lambdapo_async.config.sections import SamplingConfig
from lambdapo_async.errors import EngineError, WeightsError
from lambdapo_async.parent_death import forked_children_end_with_us
from lambdapo_async.rollout import FINISH_REASONS, LogProbs, VersionSpan
from lambdapo_async.weights.adapter import is_adapter

logger = logging.getLogger(__name__)

_SWAP_TIMEOUT_S = 600.0


class Engine(AsyncLLM):  # type: ignore[misc]  # vLLM has no types
    """vLLM's, which ends when its owner shuts it down."""

    def __del__(self) -> None:
        """Nothing: vLLM's own shuts down once more, which at exit ends in a traceback, for its modules are gone."""


class VllmEngine:
    """``InferenceEngine`` on one vLLM engine process; create it with :meth:`start`."""

    def __init__(self, llm: Engine, model_dir: Path, config: RunConfig, scratch: Path) -> None:
        self._llm = llm
        lora = config.learner.lora
        self._adapters = AdapterVersions(llm, lora, model_dir=model_dir, folder=scratch)
        self._max_length = config.model.max_length
        self._stale_kv = config.actor.stale_kv
        self._shapes = published_shapes(model_dir, lora)
        self._layout: Layout | None = None
        self._policy_version = -1
        self._sampling: set[str] = set()
        self._scoring: set[str] = set()
        self._swapping = asyncio.Lock()
        self._death: str | None = None
        self._info = EngineInfo(
            name=f"vllm {vllm.__version__}",
            device=current_platform.get_device_name(),
            dtype=coarsest_dtype(config.actor),
        )

    @classmethod
    async def start(cls, model_dir: Path, *, config: RunConfig, scratch: Path) -> Self:
        """Start the engine with dummy weights; blocks the event loop until it is ready.

        Must be called in the main thread, whose end ends the engine's process, and after
        :func:`actors.environment.prepare_environment`.

        Args:
            model_dir: folder with ``config.json`` and the tokenizer's files; weights in it are not read.
            config: ``model.max_length``, ``actor``, ``learner.lora`` and ``staleness`` are used.
            scratch: short-named folder for the engine's sockets and adapters, emptied by the caller.

        Raises:
            EngineError: vLLM cannot run this model with these settings.
        """
        os.environ["VLLM_RPC_BASE_PATH"] = str(scratch)
        if current_platform.is_cpu():
            import_model_class(model_dir)
        try:
            vllm_config = engine_args(model_dir, config).create_engine_config()
        except ValueError as error:  # for example a model.max_length beyond what the model was made for
            raise EngineError(f"vLLM refuses the model or its settings: {error}") from error
        if current_platform.is_cpu():
            # vLLM's CPU platform asks for spawn: 10 s of imports more. Forking is safe, no thread runs yet.
            os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
        try:
            with forked_children_end_with_us():
                llm = Engine.from_vllm_config(vllm_config, disable_log_stats=True)
        except (RuntimeError, ValueError, VLLMError) as error:  # for example too little memory for the KV cache
            raise EngineError(
                f"vLLM cannot start with these settings: {error} (its log says more); check "
                "actor.gpu_memory_utilization, actor.kv_cache_gib and model.max_length"
            ) from error
        return cls(llm, model_dir, config, scratch)

    @property
    def info(self) -> EngineInfo:
        """Name, device and dtype."""
        return self._info

    @property
    def policy_version(self) -> int:
        """Version of the weights loaded last; -1 before the first."""
        return self._policy_version

    async def sample_group(
        self, prompt_ids: Sequence[int], *, size: int, sampling: SamplingConfig, seed: int | None = None
    ) -> tuple[Completion, ...]:
        """See :meth:`actors.engine.InferenceEngine.sample_group`."""
        self._check_alive()
        check_request(prompt_ids, size=size, max_tokens=sampling.max_tokens, max_length=self._max_length)
        if self._policy_version < 0:
            raise EngineError(NO_WEIGHTS)
        params = SamplingParams(
            n=size,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            seed=seed,
            logprobs=0,  # of the sampled token alone
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        with self._adapters.newest() as adapter:
            output = await self._generate([int(token) for token in prompt_ids], params, adapter, self._sampling)
        return tuple(_completion(sample, adapter) for sample in sorted(output.outputs, key=lambda sample: sample.index))

    async def score(self, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> LogProbs:
        """See :meth:`actors.engine.InferenceEngine.score`."""
        self._check_alive()
        check_request(prompt_ids, size=1, max_tokens=len(completion_ids), max_length=self._max_length - 1)
        if self._policy_version < 0:
            raise EngineError(NO_WEIGHTS)
        # vLLM's prompt log-probabilities skip the sampler and with it the temperature; the one token more is a must.
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False)
        ids = [int(token) for token in (*prompt_ids, *completion_ids)]
        async with self._swapping:
            with self._adapters.newest() as adapter:
                output = await self._generate(ids, params, adapter, self._scoring)
        return np.array(output.prompt_logprobs.logprobs[len(prompt_ids) - 1 :], np.float32)  # the first token has none

    async def _generate(
        self, prompt_ids: list[int], params: SamplingParams, adapter: LoRARequest | None, running: set[str]
    ) -> RequestOutput:
        request_id = uuid.uuid4().hex
        # A cache that outlives an update must not serve those who come after it.
        prompt = tokens_input(prompt_ids, cache_salt=f"v{self._policy_version}" if self._stale_kv else None)
        running.add(request_id)
        try:
            stream = self._llm.generate(prompt, params, request_id, lora_request=adapter)
            outputs = [output async for output in stream]
        except VLLMError as error:
            raise EngineError(f"vLLM failed on a prompt of {len(prompt_ids)} tokens: {error!r}") from error
        finally:
            running.discard(request_id)
        self._check_alive()  # a dying engine ends its requests as if they had been aborted
        if not outputs or not outputs[-1].finished:
            raise EngineError(f"vLLM ended a request of {params.n} samples without its completions")
        return outputs[-1]

    async def load_weights(self, version: int, path: Path, *, changed: Set[str] | None = None) -> float:
        """See :meth:`actors.engine.InferenceEngine.load_weights`."""
        async with self._swapping:
            self._check_alive()
            layout, names = await asyncio.to_thread(self._validate, path, changed)
            pause_s = await self._swap(version, path, names)
            self._layout, self._policy_version = layout, version
            return pause_s

    async def abort_all(self) -> None:
        """See :meth:`actors.engine.InferenceEngine.abort_all`."""
        await self._abort(self._sampling)

    async def _abort(self, request_ids: Set[str]) -> None:
        with contextlib.suppress(VLLMError):  # a dead engine runs nothing, and each request says so itself
            await self._llm.abort(list(request_ids))

    async def shutdown(self) -> None:
        """End the engine's process; idempotent."""
        await self._die("it was shut down")

    def _validate(self, path: Path, changed: Set[str] | None) -> tuple[Layout, list[str]]:
        """The file's layout and the tensors to load; ``WeightsError`` unless the model can take it whole."""
        layout = read_layout(path)
        if self._layout is not None:
            check_same(path, layout, self._layout)
        else:
            self._check_first(path, layout)
        names = list(layout) if changed is None or self._layout is None else in_layers_of(changed, layout)
        check_finite(path, names)
        return layout, names

    def _check_first(self, path: Path, layout: Layout) -> None:
        """Later files are held against the first one, the first one against the model's own parameters."""
        check_names(path, layout, self._shapes.keys())
        for name, tensor in layout.items():
            if tensor.shape != self._shapes[name]:
                raise WeightsError(
                    f"{path}: {name} is {list(tensor.shape)}, this model's is {list(self._shapes[name])}"
                )

    async def _swap(self, version: int, path: Path, names: list[str]) -> float:
        """Change the weights between two steps of the engine; a swap that does not end well kills the engine."""
        try:
            async with asyncio.timeout(_SWAP_TIMEOUT_S):
                return await self._apply(version, path, names)
        except BaseException as error:  # a cancellation in the middle leaves the model half loaded, too
            await self._die(f"swapping in version {version} failed: {error!r}")
            if isinstance(error, Exception):  # vLLM raises bare ones here
                raise EngineError(str(self._death)) from error
            raise

    async def _apply(self, version: int, path: Path, names: list[str]) -> float:
        """Seconds of the pause; adapters need none, and of the model beside them nothing changes but at the start."""
        of_model = [name for name in names if not is_adapter(name)]
        pause_s = 0.0 if self._adapters.is_used and not of_model else await self._reload(version, path, of_model)
        return pause_s + await self._adapters.load(version, path)

    async def _reload(self, version: int, path: Path, names: list[str]) -> float:
        # "keep" freezes running requests (the default aborts them); clear_cache has their contexts computed anew, so
        # that later tokens are exactly the new policy's. AsyncLLM.pause_generation does this and then sleeps 20 ms for
        # the order of its outputs; ours do not need it: the engine's process tags each token with its version.
        await self._llm.engine_core.pause_scheduler_async(mode="keep", clear_cache=not self._stale_kv)
        paused = time.monotonic()  # until here the last step sampled its tokens
        untouched, _ = await asyncio.gather(
            self._llm.collective_rpc("swap_weights", args=(str(path), names)),
            self._llm.update_weight_version(str(version)),
        )
        if any(untouched):
            raise EngineError(f"version {version} left parameters without weights: {untouched[0][:5]}")
        await self._llm.resume_generation()
        return time.monotonic() - paused

    async def _die(self, reason: str) -> None:
        if self._death is None:
            self._death = reason
            await self._abort(self._sampling | self._scoring)
            self._llm.shutdown()

    def _check_alive(self) -> None:
        if self._death is not None:
            raise EngineError(f"the engine is dead: {self._death}; start a new one")
        if self._llm.errored:
            raise EngineError("the engine's process is dead; start a new one")


def _completion(sample: CompletionOutput, adapter: LoRARequest | None) -> Completion:
    if sample.finish_reason not in FINISH_REASONS:
        raise EngineError(f"vLLM finished a sample with reason {sample.finish_reason!r}, none of {FINISH_REASONS}")
    num_tokens = len(sample.token_ids)
    return Completion(
        token_ids=np.array(sample.token_ids, np.int32),
        logprobs=np.array(sample.logprobs.logprobs if num_tokens else [], np.float32),
        version_spans=tuple(_spans(sample, adapter)),
        finish_reason=sample.finish_reason,
    )


def _spans(sample: CompletionOutput, adapter: LoRARequest | None) -> Iterator[VersionSpan]:
    if adapter is None:
        for span in sample.weight_versions or ():
            yield VersionSpan(int(span.version), span.end - span.start)
    elif sample.token_ids:
        yield VersionSpan(version_of(adapter), len(sample.token_ids))
