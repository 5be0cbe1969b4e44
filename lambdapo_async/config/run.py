"""The whole configuration and the checks that only a combination shows."""

from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from lambdapo_async.config.learner import LearnerConfig
from lambdapo_async.config.objective import ObjectiveConfig, is_dotted
from lambdapo_async.config.replay import ReplayConfig
from lambdapo_async.config.sections import (
    ActorConfig,
    BrokerConfig,
    DensityConfig,
    EvaluationConfig,
    ModelConfig,
    RolloutConfig,
    SamplingConfig,
    Section,
    StalenessConfig,
    TaskConfig,
)
from lambdapo_async.config.weights import WeightsConfig
from lambdapo_async.errors import ConfigError

CONFIG_SCHEMA = 1
"""Published with a config; raised when an older actor could misread one."""


class RunConfig(Section):
    """Everything that defines a run; the actors get all of it but ``broker.url`` and ``broker.hmac_key``."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Run ids are made from it."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of data order, generated rows and the starter model."""
    output_dir: Path = Path("outputs")
    """Folder of all runs; a run writes to ``output_dir/run_id``."""
    model: ModelConfig
    """The trained model."""
    task: TaskConfig
    """Rows and rewards."""
    density: DensityConfig = DensityConfig()
    """Reward for reasoning like the reference."""
    sampling: SamplingConfig = SamplingConfig()
    """How actors sample."""
    rollout: RolloutConfig = RolloutConfig()
    """What a step is made of."""
    staleness: StalenessConfig = StalenessConfig()
    """How old a group may be."""
    replay: ReplayConfig = ReplayConfig()
    """How often a group is trained on."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """What is maximised."""
    learner: LearnerConfig = LearnerConfig()
    """The optimizer."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Held-out evaluation."""
    broker: BrokerConfig = BrokerConfig()
    """Redis."""
    weights: WeightsConfig = WeightsConfig()
    """How versions reach the actors."""
    actor: ActorConfig = ActorConfig()
    """The actors."""

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        problems = [problem for check in _CHECKS if (problem := check(self)) is not None]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def published(self) -> dict[str, Any]:
        """What the actors may know: JSON-ready, without the broker's URL and key; ``load.parse_published`` reads it."""
        secret = {"broker": {"url", "hmac_key"}}
        return {"config_schema": CONFIG_SCHEMA, **self.model_dump(mode="json", exclude=secret)}


def _check_context(config: RunConfig) -> str | None:
    if config.sampling.max_tokens < config.model.max_length:
        return None
    return (
        f"sampling.max_tokens = {config.sampling.max_tokens} leaves no room for a prompt in "
        f"model.max_length = {config.model.max_length}: lower the first or raise the second"
    )


def _check_micro_batch(config: RunConfig) -> str | None:
    if config.learner.micro_batch_tokens >= config.model.max_length:
        return None
    return (
        f"learner.micro_batch_tokens = {config.learner.micro_batch_tokens} cannot hold one sequence of "
        f"model.max_length = {config.model.max_length}: raise it"
    )


def _check_group_size(config: RunConfig) -> str | None:
    if config.rollout.group_size >= 2:
        return None
    return "rollout.group_size = 1 has no pairs, so every advantage is 0: use at least 2"


def _check_engine_holds_group(config: RunConfig) -> str | None:
    if config.rollout.group_size <= config.actor.max_num_seqs:
        return None
    return (
        f"rollout.group_size = {config.rollout.group_size} does not fit into "
        f"actor.max_num_seqs = {config.actor.max_num_seqs}: raise the second"
    )


def _check_density_with_std(config: RunConfig) -> str | None:
    advantage = config.objective.advantage
    normalised = advantage.std_norm or advantage.estimator in ("grpo", "reinforce_pp")
    if config.density.gate == "off" or not normalised:
        return None
    return (
        "density.gate with std-normalised advantages blows differences of density up to full rewards: set "
        'density.gate = "off", or objective.advantage.std_norm = false and an estimator without division'
    )


def _check_density_reference(config: RunConfig) -> str | None:
    if config.density.gate == "off" or config.task.kind != "jsonl" or config.task.solution_field:
        return None
    return f'density.gate = "{config.density.gate}" needs reference solutions: set task.solution_field'


def _check_policy_loss(config: RunConfig) -> str | None:
    from lambdapo_async.objective.presets import resolve_policy_loss, trust_region_problem  # made of these sections

    preset = config.objective.policy_loss.preset
    if preset is not None and is_dotted(preset):
        return None  # the user's own code: only the learner imports it, and checks the same
    num_updates = config.learner.minibatches * config.learner.epochs
    try:
        spec = resolve_policy_loss(config.objective.policy_loss, num_updates=num_updates)
    except ConfigError as error:
        return str(error)
    return trust_region_problem(spec, num_updates=num_updates)


def _check_minibatches(config: RunConfig) -> str | None:
    if config.learner.minibatches <= config.rollout.groups_per_step:
        return None
    return (
        f"learner.minibatches = {config.learner.minibatches} exceeds "
        f"rollout.groups_per_step = {config.rollout.groups_per_step}"
    )


def _check_drop_above(config: RunConfig) -> str | None:
    if config.staleness.drop_above > config.staleness.max_staleness:
        return None
    return (
        f"staleness.drop_above = {config.staleness.drop_above} must exceed "
        f"staleness.max_staleness = {config.staleness.max_staleness}: admission already bounds staleness"
    )


def _check_replay(config: RunConfig) -> str | None:
    from lambdapo_async.group_bytes import largest_group  # made of these sections
    from lambdapo_async.replay.limits import ReplayLimits

    try:
        limits = ReplayLimits.of(config)
    except ValueError as error:
        return f"replay: {error}"
    needed = limits.rate.min_size * largest_group(config)
    if needed <= limits.max_bytes:
        return None
    return (
        f"replay.max_bytes = {limits.max_bytes} may hold fewer than the {limits.rate.min_size} groups that a step "
        f"waits for: raise it to {needed}"
    )


def _check_queue_holds_a_step(config: RunConfig) -> str | None:
    from lambdapo_async.group_bytes import largest_group  # made of these sections

    step, group_bytes = config.rollout.groups_per_step, largest_group(config)
    if step * group_bytes <= config.broker.max_bytes and step <= config.broker.max_groups:
        return None
    return (
        f"the queue cannot hold one step: rollout.groups_per_step = {step} groups of at most {group_bytes} bytes "
        f"need broker.max_groups >= {step} (it is {config.broker.max_groups}) and "
        f"broker.max_bytes >= {step * group_bytes} (it is {config.broker.max_bytes}): raise them"
    )


def _check_lease(config: RunConfig) -> str | None:
    if config.broker.lease_s >= 3 * config.broker.heartbeat_s:
        return None
    return (
        f"broker.lease_s = {config.broker.lease_s:g} must be at least three times "
        f"broker.heartbeat_s = {config.broker.heartbeat_s:g}, or a late heartbeat loses leases"
    )


def _check_stale_kv(config: RunConfig) -> str | None:
    if not (config.actor.stale_kv and config.learner.lora):
        return None
    return (
        "actor.stale_kv keeps the contexts of groups that go on under new weights, and with learner.lora every group "
        "ends under the version it began with: set actor.stale_kv = false"
    )


def _check_quantization(config: RunConfig) -> str | None:
    if config.actor.quantization is None or config.learner.lora is None:
        return None
    return (
        f"actor.quantization = {config.actor.quantization} would add adapters to rounded weights, and learner.lora "
        "trains them beside the exact ones: leave one of them out"
    )


def _check_starter(config: RunConfig) -> str | None:
    if config.model.path != "starter" or config.task.kind == "arithmetic" or config.model.max_length >= 64:
        return None
    return 'model.path = "starter" needs model.max_length >= 64'


_CHECKS = (
    _check_context,
    _check_micro_batch,
    _check_group_size,
    _check_engine_holds_group,
    _check_density_with_std,
    _check_density_reference,
    _check_policy_loss,
    _check_minibatches,
    _check_drop_above,
    _check_replay,
    _check_queue_holds_a_step,
    _check_lease,
    _check_stale_kv,
    _check_quantization,
    _check_starter,
)
