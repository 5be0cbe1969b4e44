"""Entries and limits of replay queues, for tests."""

import math
from collections.abc import Iterable

from hypothesis import strategies as st

from lambdapo_async.replay.bias import GroupShape
from lambdapo_async.replay.limits import ReplayLimits
from lambdapo_async.replay.queue import ReplayEntry
from lambdapo_async.replay.rate_limiter import RateLimit

FOREVER = 10**9


def entry(
    number: int, *, version: int = 0, num_bytes: int = 1, mass: float = 1.0, length: int = 10
) -> ReplayEntry[str]:
    return ReplayEntry(
        number=number,
        min_version=version,
        num_bytes=num_bytes,
        mass=mass,
        shape=GroupShape(length, 0.5),
        item=f"group {number}",
    )


def make_limits(
    *,
    groups: int = 2,
    min_size: int | None = None,
    ratio: float | None = None,
    buffer: float = 0.0,
    max_uses: int = 1,
    max_groups: int = 100,
    max_bytes: int = 1000,
    drop_above: int = FOREVER,
    half_life: float = math.inf,
    seed: int = 0,
) -> ReplayLimits:
    return ReplayLimits(
        rate=RateLimit(
            groups_per_sample=groups, min_size=min_size or groups, samples_per_insert=ratio, error_buffer=buffer
        ),
        max_uses=max_uses,
        max_groups=max_groups,
        max_bytes=max_bytes,
        drop_above=drop_above,
        half_life=half_life,
        seed=seed,
    )


def numbers(entries: Iterable[ReplayEntry[str]]) -> list[int]:
    return [entry.number for entry in entries]


@st.composite
def any_limits(draw: st.DrawFn) -> ReplayLimits:
    groups = draw(st.integers(1, 3))
    max_uses = draw(st.integers(1, 4))
    ratio = draw(st.sampled_from([None, *(value for value in (1.0, 1.5, 2.0, 4.0) if value <= max_uses)]))
    min_size = groups + draw(st.integers(0, 3))
    return make_limits(
        groups=groups,
        min_size=min_size,
        ratio=ratio if max_uses > 1 else None,
        buffer=max(groups, ratio or 0.0) + draw(st.integers(0, 3)),
        max_uses=max_uses,
        max_groups=min_size + draw(st.integers(0, 8)),
        max_bytes=draw(st.integers(10 * groups, 100)),
        drop_above=draw(st.integers(1, 6)),
        half_life=draw(st.sampled_from([1.0, 4.0, math.inf])),
        seed=draw(st.integers(0, 5)),
    )
