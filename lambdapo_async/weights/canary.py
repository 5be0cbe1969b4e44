"""The canary: fixed prompts and completions that learner and actor score under the same weights.

A checksum proves that an actor holds the learner's bits; the canary proves that it computes the same with them: other
kernels, a stale output layer, another tokenizer or a wrong rotary base show in the log-probabilities alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Self

import msgpack
import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, StringConstraints, ValidationError, model_validator

from lambdapo_async.errors import WeightsError
from lambdapo_async.weights.delta_file import Checksum

MAX_CANARY_BYTES = 2**20
"""A larger record is refused, and never decoded."""
MAX_ROWS = 64

_CONFIG_FILE = "config.json"
_NEITHER = ("generation_config.json",)

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
LogProb = Annotated[float, Field(le=0.0, allow_inf_nan=False)]
Hash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]


class CanaryError(WeightsError):
    """An actor that would not sample from the learner's policy; it must not sample at all."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Largest differences in nats that rounding explains."""

    mean: float
    max: float

    def or_looser(self, other: "Tolerance") -> "Tolerance":
        """What both roundings together are allowed."""
        return Tolerance(max(self.mean, other.mean), max(self.max, other.max))


TOLERANCES: Mapping[str, Tolerance] = MappingProxyType(
    {
        # Measured between vLLM and transformers, mean / max in nats: float32 2e-6 / 1.3e-5, bfloat16 0.019 / 0.11 at
        # temperature 1. A stale output layer was 1.9 nats off, a swap without a pause up to 4.5.
        "float64": Tolerance(1e-4, 1e-3),
        "float32": Tolerance(1e-4, 1e-3),
        "float16": Tolerance(0.01, 0.1),
        "bfloat16": Tolerance(0.05, 0.5),
        # Weights rounded once more at the actor: 0.038 / 0.86 on the starter model, up to 0.09 in a single completion.
        "fp8": Tolerance(0.15, 2.0),
    }
)


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """What must be the same before any number is compared."""

    config_hash: str
    tokenizer_hash: str

    @classmethod
    def of(cls, model_files: Mapping[str, bytes]) -> Self:
        """Of a run's model files: file name -> content; sampling defaults belong to neither.

        Raises:
            WeightsError: there is no ``config.json``.
        """
        if _CONFIG_FILE not in model_files:
            raise WeightsError(f"the model files {sorted(model_files)!s:.200} have no {_CONFIG_FILE}")
        tokenizer = xxhash.xxh3_128()
        for name in sorted(model_files.keys() - {_CONFIG_FILE, *_NEITHER}):
            tokenizer.update(f"{name}\0".encode())
            tokenizer.update(xxhash.xxh3_128_digest(model_files[name]))
        return cls(xxhash.xxh3_128_hexdigest(model_files[_CONFIG_FILE]), tokenizer.hexdigest())


class CanaryRow(BaseModel):
    """One completion and what the learner thinks of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt_ids: Annotated[tuple[TokenId, ...], Field(min_length=1)]
    """[P]"""
    completion_ids: Annotated[tuple[TokenId, ...], Field(min_length=1)]
    """[C]"""
    logprobs: tuple[LogProb, ...]
    """[C] float32 log pi in nats at temperature 1."""

    @model_validator(mode="after")
    def _one_each(self) -> Self:
        if len(self.logprobs) != len(self.completion_ids):
            raise ValueError(f"{len(self.logprobs)} log-probabilities for {len(self.completion_ids)} tokens")
        return self


class Canary(BaseModel):
    """What the learner publishes about one version."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: NonNegativeInt
    checksum: Checksum
    """Of the published state."""
    config_hash: Hash
    tokenizer_hash: Hash
    dtype: str
    """Coarsest type between the published weights and these numbers, a key of ``TOLERANCES``: ``bfloat16`` when the
    learner computes in it, or with float32 weights that are published as bfloat16."""
    rows: Annotated[tuple[CanaryRow, ...], Field(min_length=1, max_length=MAX_ROWS)]

    def to_bytes(self) -> bytes:
        """The record in Redis (msgpack)."""
        record: bytes = msgpack.packb(self.model_dump())
        if len(record) > MAX_CANARY_BYTES:
            raise WeightsError(f"a canary of {len(record)} bytes exceeds {MAX_CANARY_BYTES}: use fewer or shorter rows")
        return record

    @classmethod
    def from_bytes(cls, record: bytes) -> Self:
        """Inverse of :meth:`to_bytes`; ``WeightsError`` for anything else."""
        if len(record) > MAX_CANARY_BYTES:
            raise WeightsError(f"a canary of {len(record)} bytes exceeds {MAX_CANARY_BYTES}")
        try:
            return cls.model_validate(msgpack.unpackb(record))
        except (ValueError, ValidationError, msgpack.UnpackException) as error:
            raise WeightsError(f"the canary is unreadable: {error!s:.300}") from error

    def check_identity(self, identity: ModelIdentity, *, checksum: str) -> None:
        """``CanaryError`` unless model, tokenizer and weights are the learner's.

        Args:
            identity: of the actor's model files.
            checksum: of the actor's weights at ``version``.
        """
        pairs = {
            "model config": (identity.config_hash, self.config_hash),
            "tokenizer": (identity.tokenizer_hash, self.tokenizer_hash),
            "weights": (checksum, self.checksum),
        }
        for what, (ours, theirs) in pairs.items():
            if ours != theirs:
                raise CanaryError(
                    f"at version {self.version} this actor's {what} is {ours} and the learner's {theirs}: "
                    "start the actor anew, with the learner's run id"
                )


@dataclass(frozen=True, slots=True)
class CanaryVerdict:
    """How far an actor is from its learner."""

    version: int
    dtype: str
    mean_gap: float
    """Mean absolute difference of log-probabilities over all tokens, in nats."""
    max_gap: float
    tolerance: Tolerance

    @property
    def is_passed(self) -> bool:
        """Whether rounding explains it; NaN is never explained."""
        return self.mean_gap <= self.tolerance.mean and self.max_gap <= self.tolerance.max

    def check(self) -> None:
        """``CanaryError`` unless passed."""
        if not self.is_passed:
            raise CanaryError(
                f"at version {self.version} this actor ({self.dtype}) differs from the learner by {self.mean_gap:.3g} "
                f"nats per token on average and {self.max_gap:.3g} at most; {self.tolerance.mean:g} and "
                f"{self.tolerance.max:g} are allowed: it does not sample from the learner's policy. Check its engine's "
                "version, attention backend and actor.dtype"
            )


def compare(canary: Canary, scored: Sequence[NDArray[np.float32]], *, dtype: str) -> CanaryVerdict:
    """How far ``scored`` is from the learner's numbers.

    Args:
        canary: of the version that was scored.
        scored: [C] log-probabilities of each row's completion at temperature 1.
        dtype: the actor's, a key of ``TOLERANCES``.

    Raises:
        WeightsError: a type without a tolerance, or scores of other lengths.
    """
    if unknown := {dtype, canary.dtype} - TOLERANCES.keys():
        raise WeightsError(f"no tolerance is known for {min(unknown)!r:.50}: it is one of {', '.join(TOLERANCES)}")
    found, expected = [len(each) for each in scored], [len(row.completion_ids) for row in canary.rows]
    if found != expected:
        raise WeightsError(f"the engine scored {found!s:.200} tokens of {expected!s:.200}")
    theirs = np.concatenate([np.asarray(row.logprobs, np.float64) for row in canary.rows])
    gaps = np.abs(np.concatenate(scored).astype(np.float64) - theirs)
    tolerance = TOLERANCES[dtype].or_looser(TOLERANCES[canary.dtype])
    return CanaryVerdict(canary.version, dtype, float(gaps.mean()), float(gaps.max()), tolerance)
