"""What rank 0 orders and the other ranks do: the same work at the same moment, each on its share.

FSDP's collectives need every rank in every forward and backward pass, publication and checkpoint. So rank 0 gives an
order first and then does its own part; the others take orders until the last one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgpack

from lambdapo_async.rollout import RolloutGroup
from lambdapo_async.wire import decode_group, encode_group
from learner.parallel import Ranks

_TRAIN, _PUBLISH, _SCORE, _SAVE, _FINISH = "train", "publish", "score", "save", "finish"


@dataclass(frozen=True, slots=True)
class Crew:
    """Rank 0's side. A process alone gives no orders: every method returns at once."""

    ranks: Ranks

    def train(self, groups: Sequence[RolloutGroup], *, version: int) -> None:
        """Take one step on ``groups``, from policy version ``version``."""
        if not self.ranks.is_alone:
            self._order(_TRAIN, version, [encode_group(group) for group in groups])

    def publish(self) -> None:
        """Join the gathering of all parameters."""
        self._order(_PUBLISH)

    def score(self, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> None:
        """Join the forward pass of one row of the canary."""
        self._order(_SCORE, list(prompt_ids), list(completion_ids))

    def save(self, folder: Path) -> None:
        """Write a share of a checkpoint into ``folder``, which exists on storage that all ranks see."""
        self._order(_SAVE, str(folder.resolve()))

    def finish(self) -> None:
        """Go home."""
        self._order(_FINISH)

    def _order(self, kind: str, *details: object) -> None:
        if not self.ranks.is_alone:
            self.ranks.send(msgpack.packb([kind, *details]))


class Duties(Protocol):
    """What every rank but the first does when told."""

    def train(self, groups: Sequence[RolloutGroup], *, version: int) -> None:
        """Take one step on this rank's share of ``groups``."""

    def publish(self) -> None:
        """Join the gathering of all parameters."""

    def score(self, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> None:
        """Join the forward pass of one row of the canary."""

    def save(self, folder: Path) -> None:
        """Write this rank's share of a checkpoint."""


def take_orders(ranks: Ranks, duties: Duties, *, vocab_size: int) -> None:
    """The other ranks' side: do what rank 0 says until it says that all is done.

    consumes: orders    waits for: rank 0    unblocks: rank 0's next collective

    Raises:
        RankLostError: rank 0 died or fell silent.
    """
    while True:
        kind, *details = msgpack.unpackb(ranks.receive())
        match kind, details:
            case "train", [version, payloads]:
                groups = [decode_group(payload, vocab_size=vocab_size, max_version=version) for payload in payloads]
                duties.train(groups, version=version)
            case "publish", []:
                duties.publish()
            case "score", [prompt_ids, completion_ids]:
                duties.score(prompt_ids, completion_ids)
            case "save", [folder]:
                duties.save(Path(folder))
            case "finish", []:
                return
            case _:
                raise AssertionError(f"rank 0 ordered {kind!r} with {len(details)} details")
