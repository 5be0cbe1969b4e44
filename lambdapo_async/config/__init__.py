"""The run's configuration: one frozen tree, read once, published to the actors."""

from lambdapo_async.config.load import load_config
from lambdapo_async.config.run import RunConfig

__all__ = ["RunConfig", "load_config"]
