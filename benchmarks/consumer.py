"""The learner's side of Redis without a learner."""

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer

from benchmarks.processes import Running, wait_for
from lambdapo_async.broker.interface import Delivery, Durable
from lambdapo_async.broker.limits import RunLimits
from lambdapo_async.broker.redis_run import RedisRun
from lambdapo_async.config import RunConfig
from lambdapo_async.tasks.prompts import PromptEncoder
from lambdapo_async.tasks.registry import build_task
from lambdapo_async.weights.canary import ModelIdentity
from learner.canary import LearnerCanary, canary_sequences
from learner.policy import Policy
from learner.publisher import Publisher
from learner.session import fitting_rows


class Consumer:
    """Publishes version 0, then reads and opens the gate."""

    def __init__(self, config: RunConfig, run_id: str, model_dir: Path) -> None:
        self.config = config
        self.run = RedisRun(config.broker.url, run_id, timeout_s=config.broker.timeout_s)
        policy = Policy.load(
            model_dir, revision=None, config=config.learner, temperature=1.0, device=torch.device("cpu")
        )
        task, tokenizer = build_task(config), AutoTokenizer.from_pretrained(model_dir)
        rows = fitting_rows(task, tokenizer, config)
        self.run.run_store.create(json.dumps(config.published()).encode(), policy.model_files, fence=1)
        self.run.run_store.put_rows("train", [row.as_map() for row in rows.train])
        self.run.run_store.put_rows("heldout", [row.as_map() for row in rows.heldout])
        self.source = self.run.source(1, RunLimits.of(config))
        self.source.initialise(Durable(watermarks={}, consumed=0, waiting=0, next_index=0, holes=()))
        publisher = Publisher(self.run.weights_for(config.weights), run_id=run_id, fence=1, config=config.weights)
        publisher.publish(0, policy, consumed=0)
        publisher.flush()
        scored = canary_sequences(
            [rows.train], PromptEncoder(tokenizer, task, config), tokenizer, max_tokens=config.sampling.max_tokens
        )
        canary = LearnerCanary(self.run.canary, policy, scored, identity=ModelIdentity.of(policy.model_files), fence=1)
        canary.publish(0, publisher.checksum(), keyframe_version=0)
        publisher.close()
        self.run.run_store.set_phase("running", fence=1)
        self.consumed = 0

    def read(self, count: int, *watched: Running) -> list[Delivery]:
        deliveries: list[Delivery] = []

        def enough() -> bool:
            for delivery in self.source.read(self.config.rollout.groups_per_step, timeout_s=0.2):
                deliveries.append(delivery)
                self.consumed += 1
                self.source.release(self.consumed)
                self.source.commit({delivery.descriptor.producer: delivery.descriptor.seq})
            return len(deliveries) >= count

        wait_for(enough, *watched)
        return deliveries
