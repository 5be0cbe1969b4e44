"""Config -> the policy loss of a run, with everything of the user's own imported: the learner's first act."""

from lambdapo_async.config import RunConfig
from lambdapo_async.errors import ConfigError
from lambdapo_async.objective.advantage import estimator_of
from lambdapo_async.objective.policy_loss import surrogate_of
from lambdapo_async.objective.presets import PolicyLossSpec, resolve_policy_loss, trust_region_problem


def resolve_objective(config: RunConfig) -> PolicyLossSpec:
    """The five knobs of the run's policy loss.

    Raises:
        ConfigError: a dotted path that cannot be imported or names the wrong thing, or several updates from one batch
            without a trust region.
    """
    num_updates = config.learner.minibatches * config.learner.epochs
    spec = resolve_policy_loss(config.objective.policy_loss, num_updates=num_updates)
    estimator_of(config.objective.advantage)
    surrogate_of(spec.surrogate)
    if problem := trust_region_problem(spec, num_updates=num_updates):
        raise ConfigError(problem)
    return spec
