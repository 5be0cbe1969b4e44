"""This process as one of a run's ranks: its threads, seed, device and memory set before it joins the others."""

from collections.abc import Callable

import torch
from transformers.utils import logging as transformers_logging

from lambdapo_async.config import RunConfig
from learner.crew_member import run_member
from learner.host_memory import keep_freed_memory
from learner.parallel import Ranks, join_ranks
from learner.policy import pick_device


def run_rank(config: RunConfig, lead: Callable[[Ranks], None]) -> None:
    """Join the ranks that torchrun started: rank 0 does ``lead``, every other one what rank 0 asks of it."""
    if config.learner.num_threads is not None:
        torch.set_num_threads(config.learner.num_threads)
    torch.manual_seed(config.seed)
    transformers_logging.disable_progress_bar()
    device = pick_device(config.learner.device)
    if device.type == "cpu":
        keep_freed_memory()
    with join_ranks(device, context_size=config.learner.context_parallel) as ranks:
        if ranks.is_main:
            lead(ranks)
        else:
            run_member(config, ranks)
