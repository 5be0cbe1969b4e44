"""Actors that live and die in any order: every group reaches the learner once."""

import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.groups import make_group
from tests.outbox_world import World, abandon, files


class Life:
    """One actor after the other on the same machine, and everything that can happen to them."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.lives, self.sent = 1, 0
        self.outboxes = [world.outbox("a0.0")]

    async def send(self) -> None:
        await self.outboxes[-1].send(make_group(self.sent))
        self.sent += 1

    async def read(self) -> None:
        self.world.read()

    async def commit(self) -> None:
        self.world.commit()

    async def poll(self) -> None:
        await self.outboxes[0].poll()

    async def restart(self) -> None:
        self.world.run.shared.restart()
        self.world.source = self.world.learner(fence=1)

    async def lose_everything(self) -> None:
        self.world.lose_everything()

    async def kill(self) -> None:
        for outbox in self.outboxes:
            abandon(outbox)
        self.outboxes = [*self.world.orphans(), self.world.outbox(f"a{self.lives}.0")]
        self.lives += 1

    async def live_through(self, events: list[Callable[["Life"], Awaitable[None]]]) -> None:
        for event in events:
            await event(self)
        while any(outbox.unconfirmed for outbox in self.outboxes):
            for outbox in self.outboxes:
                await outbox.poll()
            self.world.commit()
        for outbox in self.outboxes:
            await outbox.close(is_run_finished=False)


EVENTS = (Life.send, Life.send, Life.read, Life.commit, Life.poll, Life.restart, Life.lose_everything, Life.kill)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(EVENTS), max_size=40))
def test_whatever_happens_every_group_is_journaled_once(events: list[Callable[[Life], Awaitable[None]]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        life = Life(World(Path(folder)))
        asyncio.run(life.live_through(events))
        assert sorted(life.world.received) == list(range(life.sent))
        assert files(life.world.root) == []
