"""Whether a learner may have the run id it was given: a run is one config, one Redis and one folder."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lambdapo_async.broker.interface import RunStore
from lambdapo_async.config import RunConfig
from lambdapo_async.errors import ConfigError, RunNotPublishedError
from lambdapo_async.report.run_folder import recorded_config

# What actors and the journal depend on, beside learner.lora; everything else may change from one life to the next.
_FIXED = frozenset({"seed", "model", "task", "density", "sampling", "rollout", "replay"})


def refuse_taken_id(run_store: RunStore, run_id: str) -> None:
    """``ConfigError`` when Redis holds a run of this id: a fresh start would mix with its groups and weights.

    Raises:
        RunNotFoundError: it holds one in a schema that is not ours.
    """
    try:
        run_store.state()
    except RunNotPublishedError:
        return
    raise ConfigError(
        f"this Redis already holds run {run_id}: add --resume to go on with it, or choose another --run-id"
    )


def refuse_other_schema(run_store: RunStore) -> None:
    """``RunNotFoundError`` when Redis holds the run in a schema that is not ours; it may hold none of it."""
    with contextlib.suppress(RunNotPublishedError):
        run_store.state()


def check_same_config(folder: Path, config: RunConfig) -> None:
    """``ConfigError`` when ``config`` differs from the folder's run in what cannot change on ``--resume``."""
    before, now = _fixed(recorded_config(folder)), _fixed(config.published())
    changed = [name for name, value in sorted(before.items()) if now.get(name) != value]
    if changed:
        raise ConfigError(
            f"--resume: the run in {folder} has another {', '.join(changed)}, on which actors and the journal depend: "
            "set it back, or start another run"
        )


def _fixed(published: Mapping[str, Any]) -> dict[str, object]:
    """Dotted name -> value of what is there of the fixed keys."""
    fixed: dict[str, object] = {}
    for section in published.keys() & _FIXED:
        values = published[section]
        fixed |= (
            {f"{section}.{key}": each for key, each in values.items()}
            if isinstance(values, dict)
            else {section: values}
        )
    # Checkpoints hold adapters or whole models, and actors know which tensors are to come.
    if "lora" in published.get("learner", {}):
        fixed["learner.lora"] = published["learner"]["lora"]
    return fixed
