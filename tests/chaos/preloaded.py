"""What the zygote imports before it forks."""

import gc

import tests.chaos.actor_process
import tests.chaos.learner_process  # noqa: F401

gc.collect()
gc.freeze()  # else the first collection of each child copies every page
