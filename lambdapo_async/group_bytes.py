"""How large a group can become on the wire: what a lease reserves in the queue for its answer."""

from lambdapo_async.config import RunConfig
from lambdapo_async.wire import MAX_REWARD_PARTS

_PER_TOKEN = 4 + 4 + 12 + 8
"""Id, log-probability, a version span of its own at worst, and its text (UTF-8, longer than nearly all tokens)."""
_PER_ROLLOUT = 64 + 8 * MAX_REWARD_PARTS
_PER_GROUP = 2048 + 128 * MAX_REWARD_PARTS
"""Names, headers, lease, actor, signature."""


def largest_group(config: RunConfig) -> int:
    """Bytes that no group of this run exceeds, unless its texts have more than 20 bytes a token on average."""
    prompt = 4 * config.model.max_length
    rollout = _PER_ROLLOUT + _PER_TOKEN * config.sampling.max_tokens
    return _PER_GROUP + prompt + config.rollout.group_size * rollout
