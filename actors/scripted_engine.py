"""An engine without a model: a script says what it samples. For tests and simulations of the whole pipeline."""

import asyncio
import time
from collections.abc import Callable, Sequence, Set
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actors.engine import Completion, EngineInfo
from actors.requests import NO_WEIGHTS, check_request
from actors.weights_file import Layout, check_finite, check_same, read_layout
from lambdapo_async.config.sections import SamplingConfig
from lambdapo_async.errors import EngineError
from lambdapo_async.rollout import FinishReason, LogProbs, VersionSpan

Script = Callable[[int, Sequence[int]], NDArray[np.float64]]
"""(policy version, [P + t] tokens so far) -> [V] float64 logits of the next token; must be deterministic."""


def bigram_script(vocab_size: int, *, scale: float = 2.0) -> Script:
    """A random table of logits per version, indexed by the last token; versions differ by about ``scale`` nats."""

    def logits(policy_version: int, tokens: Sequence[int]) -> NDArray[np.float64]:
        return np.random.default_rng([policy_version, tokens[-1]]).normal(0.0, scale, vocab_size)

    return logits


def sampling_logprobs(logits: NDArray[np.float64], sampling: SamplingConfig) -> NDArray[np.float64]:
    """[V] log-probabilities that the next token is drawn from: temperature, then top-k, then top-p.

    Excluded tokens are -inf; the rest is normalised anew.
    """
    scaled = logits / sampling.temperature
    order = np.argsort(-scaled, kind="stable")
    logprobs = _log_softmax(scaled)
    if sampling.top_k > 0:
        logprobs[order[sampling.top_k :]] = -np.inf
        logprobs = _log_softmax(logprobs)
    mass_before = np.cumsum(np.exp(logprobs[order])) - np.exp(logprobs[order])
    logprobs[order[mass_before >= sampling.top_p]] = -np.inf
    return _log_softmax(logprobs)


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max()
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return result


class _Sample:
    """One completion in the making."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self.token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._versions: list[int] = []
        self.finish_reason: FinishReason | None = None

    def draw(self, logprobs: NDArray[np.float64], policy_version: int) -> int:
        """Sample one token, remember its log-probability and version."""
        token = int(self._rng.choice(len(logprobs), p=np.exp(logprobs)))
        self.token_ids.append(token)
        self._logprobs.append(min(0.0, float(logprobs[token])))
        self._versions.append(policy_version)
        return token

    def completion(self) -> Completion:
        """What was sampled so far; ``abort`` if it had not ended."""
        return Completion(
            token_ids=np.array(self.token_ids, np.int32),
            logprobs=np.array(self._logprobs, np.float32),
            version_spans=tuple(VersionSpan(v, len(list(run))) for v, run in groupby(self._versions)),
            finish_reason=self.finish_reason or "abort",
        )


class _Request:
    """The samples of one group."""

    def __init__(self, rng: np.random.Generator, size: int, policy_version: int) -> None:
        self.policy_version = policy_version
        """Under which it began."""
        self.samples = [_Sample(child) for child in rng.spawn(size)]
        self.aborted = False

    @property
    def unfinished(self) -> list[_Sample]:
        return [] if self.aborted else [sample for sample in self.samples if sample.finish_reason is None]


class ScriptedEngine:
    """``InferenceEngine`` that samples from a :data:`Script`, one token of every sample per turn of the event loop.

    It validates weight files as the real engine does but looks at nothing in them except the layout.
    """

    def __init__(self, script: Script, *, eos_token_id: int, max_length: int, seed: int = 0) -> None:
        self._script = script
        self._eos_token_id = eos_token_id
        self._max_length = max_length
        self._rng = np.random.default_rng(seed)
        self._layout: Layout | None = None
        self._policy_version = -1
        self._running: set[_Request] = set()
        self._death: str | None = None

    @property
    def info(self) -> EngineInfo:
        """Name, device and dtype."""
        return EngineInfo(name="scripted", device="cpu", dtype="float64")

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
        rng = self._rng.spawn(1)[0] if seed is None else np.random.default_rng(seed)
        request = _Request(rng, size, self._policy_version)
        self._running.add(request)
        try:
            while request.unfinished:
                await asyncio.sleep(0)  # updates, aborts and other requests come between two tokens
                self._check_alive()
                for sample in request.unfinished:
                    self._step(sample, prompt_ids, sampling, policy_version=self._version_of(request))
        finally:
            self._running.discard(request)
        return tuple(sample.completion() for sample in request.samples)

    def _version_of(self, request: _Request) -> int:
        """Under which its next token is sampled."""
        del request
        return self._policy_version

    def _step(
        self, sample: _Sample, prompt_ids: Sequence[int], sampling: SamplingConfig, *, policy_version: int
    ) -> None:
        logits = self._script(policy_version, [*prompt_ids, *sample.token_ids])
        token = sample.draw(sampling_logprobs(logits, sampling), policy_version)
        if token == self._eos_token_id:
            sample.finish_reason = "stop"
        elif len(sample.token_ids) == sampling.max_tokens:
            sample.finish_reason = "length"

    async def score(self, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> LogProbs:
        """See :meth:`actors.engine.InferenceEngine.score`."""
        self._check_alive()
        check_request(prompt_ids, size=1, max_tokens=len(completion_ids), max_length=self._max_length - 1)
        if self._policy_version < 0:
            raise EngineError(NO_WEIGHTS)
        contexts = ([*prompt_ids, *completion_ids[:num_tokens]] for num_tokens in range(len(completion_ids)))
        logprobs = [_log_softmax(self._script(self._policy_version, context)) for context in contexts]
        return np.array([row[token] for row, token in zip(logprobs, completion_ids, strict=True)], np.float32)

    async def load_weights(self, version: int, path: Path, *, changed: Set[str] | None = None) -> float:
        """See :meth:`actors.engine.InferenceEngine.load_weights`; the first file sets the layout of all others."""
        self._check_alive()
        started = time.monotonic()
        layout = read_layout(path)
        check_same(path, layout, layout if self._layout is None else self._layout)
        check_finite(path, layout)
        self._layout, self._policy_version = layout, version
        return time.monotonic() - started

    async def abort_all(self) -> None:
        """See :meth:`actors.engine.InferenceEngine.abort_all`."""
        for request in self._running:
            request.aborted = True

    async def shutdown(self) -> None:
        """Refuse everything from now on; idempotent."""
        self.die("it was shut down")

    def die(self, reason: str) -> None:
        """Fail as an engine whose process was killed: every running and later request raises."""
        self._death = self._death or reason

    def _check_alive(self) -> None:
        if self._death is not None:
            raise EngineError(f"the engine is dead: {self._death}; start a new one")


class ScriptedAdapterEngine(ScriptedEngine):
    """A scripted engine whose versions are adapters: a request ends under the one it began with."""

    def _version_of(self, request: _Request) -> int:
        return request.policy_version
