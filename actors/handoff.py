"""What an actor that must go has of its groups, kept for the actors that answer them in its place."""

import logging
from collections.abc import Callable, Mapping

from actors.engine import Completion
from actors.prompts import Prompt
from actors.sampled import Sampled
from lambdapo_async.broker.partials import PartialStore
from lambdapo_async.config import RunConfig
from lambdapo_async.errors import WireFormatError
from lambdapo_async.rollout import Lease, RolloutGroup
from lambdapo_async.seal import Seal
from lambdapo_async.wire import PARTIAL, decode_group, encode_group

logger = logging.getLogger(__name__)


class Handoff:
    """Leaves and takes partials; its calls wait for Redis, so they belong on a thread. Off, it does neither.

    Whatever is wrong with a partial costs its tokens and nothing else: the group is sampled from its beginning.

    Args:
        newest_version: newest policy version there is; a partial that claims a newer one is none of ours.
    """

    def __init__(
        self,
        store: PartialStore,
        seal: Seal,
        config: RunConfig,
        *,
        actor_id: str,
        vocab_size: int,
        newest_version: Callable[[], int],
    ) -> None:
        self._store, self._seal, self._config, self._actor_id = store, seal, config, actor_id
        self._vocab_size, self._newest_version = vocab_size, newest_version
        self._continued: set[Lease] = set()
        self._num_left = self._num_taken = self._tokens_taken = 0
        self._num_refused = self._num_damaged = self._num_stale = 0

    def leave(self, unsent: Mapping[Lease, Sampled]) -> None:
        """Keep what there is of groups whose leases we hold and hand back next."""
        if not self._config.actor.handoff:
            return
        for lease, sampled in unsent.items():
            if sampled.num_tokens == 0:
                continue
            try:
                payload = encode_group(sampled.unrewarded(lease, self._actor_id))
                is_kept = self._store.leave(lease, self._seal.close(payload, purpose=PARTIAL))
            except WireFormatError as error:
                logger.warning("the samples of %s are lost: %s", lease.id, error)
                is_kept = False
            self._num_left += is_kept
            self._num_refused += not is_kept
        logger.info("left the samples of %d groups (%d found no room)", self._num_left, self._num_refused)

    def take(self, lease: Lease, prompt: Prompt, *, version: int) -> Sampled | None:
        """What another actor left of ``lease``, if it is worth continuing under ``version``."""
        payload = self._store.take(lease) if self._config.actor.handoff else None
        if payload is None:
            return None
        try:
            message = self._seal.open(payload, purpose=PARTIAL)
            group = decode_group(message, vocab_size=self._vocab_size, max_version=self._newest_version())
            check_continues(group, lease, prompt, max_tokens=self._config.sampling.max_tokens)
        except WireFormatError as error:
            self._num_damaged += 1
            logger.warning("the samples that were left of %s are of no use: %s", lease.id, error)
            self._store.forget(lease)
            return None
        if version - group.min_version > self._config.staleness.max_staleness:
            self._num_stale += 1
            self._store.forget(lease)
            return None
        sampled = _as_sampled(group, prompt)
        self._num_taken += 1
        self._tokens_taken += sampled.num_tokens
        self._continued.add(lease)
        return sampled

    def done(self, lease: Lease) -> None:
        """The group is on its way: what was left of it is of no use any more."""
        if lease in self._continued:
            self._continued.discard(lease)
            self._store.forget(lease)

    def counters(self) -> Mapping[str, float]:
        """For the heartbeat: totals since the start."""
        return {
            "partials_left": self._num_left,
            "partials_refused": self._num_refused,
            "partials_continued": self._num_taken,
            "partials_damaged": self._num_damaged,
            "partials_stale": self._num_stale,
            "partial_tokens": self._tokens_taken,
        }


def check_continues(group: RolloutGroup, lease: Lease, prompt: Prompt, *, max_tokens: int) -> None:
    """``WireFormatError`` unless ``group`` is the beginning of an answer to ``prompt``."""
    if group.lease != lease or group.prompt_ids.tolist() != prompt.token_ids.tolist():
        raise WireFormatError(f"they answer {group.lease.id} with a prompt of {len(group.prompt_ids)} tokens")
    if len(group.rollouts) != prompt.num_samples:
        raise WireFormatError(f"they are {len(group.rollouts)}, this run asks for {prompt.num_samples}")
    for rollout in group.rollouts:
        longest = max_tokens - (rollout.finish_reason == "abort")
        if rollout.num_tokens > longest:
            raise WireFormatError(f"one has {rollout.num_tokens} tokens, at most {longest} fit")


def _as_sampled(group: RolloutGroup, prompt: Prompt) -> Sampled:
    completions = (
        Completion(
            token_ids=rollout.completion_ids,
            logprobs=rollout.behavior_logprobs,
            version_spans=rollout.version_spans,
            finish_reason=rollout.finish_reason,
        )
        for rollout in group.rollouts
    )
    timing = group.timing
    return Sampled(
        prompt=prompt,
        completions=tuple(completions),
        started_at=timing.started_at,
        generation_s=timing.generation_s,
    )
