"""From a config to its task."""

from lambdapo_async.config import RunConfig
from lambdapo_async.config.sections import ArithmeticTask
from lambdapo_async.tasks.arithmetic import Arithmetic
from lambdapo_async.tasks.dataset import JsonlRows
from lambdapo_async.tasks.interface import Task


def build_task(config: RunConfig) -> Task:
    """The config's task. Its rows are made or read when first asked for, so an actor needs no data file.

    Raises:
        TaskError: a reward function that cannot be found, or more rows wanted than there can be.
    """
    if isinstance(config.task, ArithmeticTask):
        return Arithmetic(config.task, config)
    return JsonlRows(config.task, config)
