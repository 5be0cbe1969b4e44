"""What was sent is kept on the disk until the learner has it, through losses and deaths."""

from pathlib import Path

import pytest

from tests.groups import make_group
from tests.outbox_world import World, abandon, files


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_a_group_is_kept_until_the_learner_has_it(world: World) -> None:
    outbox = world.outbox()
    for index in range(3):
        await outbox.send(make_group(index))
    await outbox.poll()
    assert outbox.unconfirmed == 3
    world.commit()
    await outbox.poll()
    assert (outbox.unconfirmed, files(world.root)) == (0, [])
    await outbox.close(is_run_finished=False)
    assert list(world.root.iterdir()) == []


async def test_an_idle_actor_notices_that_redis_lost_its_groups(world: World) -> None:
    outbox = world.outbox()
    for index in range(4):
        await outbox.send(make_group(index))
        if index == 1:
            world.commit()
    world.lose_everything()
    await outbox.poll()
    world.commit()
    assert world.received == [0, 1, 2, 3]
    assert outbox.restarts == 1
    # A group that the learner journaled but could not commit is not offered again.
    await outbox.send(make_group(4))
    world.read()
    world.lose_everything()
    await outbox.poll()
    world.commit()
    assert world.received == [0, 1, 2, 3, 4]
    assert outbox.unconfirmed == 0


async def test_nothing_is_offered_to_a_server_that_waits_for_its_learner(world: World) -> None:
    outbox = world.outbox()
    await outbox.send(make_group(0))
    world.run.shared.restart()
    await outbox.poll()
    assert outbox.unconfirmed == 1
    world.source = world.learner(fence=1)
    world.commit()
    await outbox.poll()
    assert (outbox.unconfirmed, world.received) == (0, [0])


async def test_the_next_actor_sends_what_a_dead_one_left(world: World) -> None:
    world.run.admission("a").lease(4)
    dead = world.outbox()
    for index in range(4):
        await dead.send(make_group(index))
        if index == 0:
            world.commit()
    # Killed: nothing but the disk is left; and Redis loses what it had.
    abandon(dead)
    world.lose_everything()
    (orphan,) = world.orphans()
    await orphan.poll()
    assert orphan.unconfirmed == 3
    world.commit()
    await orphan.poll()
    assert (orphan.unconfirmed, world.received) == (0, [0, 1, 2, 3])
    await orphan.close(is_run_finished=False)
    assert list(world.root.iterdir()) == []


async def test_a_dead_actors_group_is_dropped_when_somebody_else_answers_its_prompt(world: World) -> None:
    dead = world.outbox()
    for index in (7, 8):
        await dead.send(make_group(index))
    abandon(dead)
    world.lose_everything()
    other = world.outbox("b.0")
    await other.send(make_group(7))
    (orphan,) = world.orphans()
    await orphan.poll()
    world.commit()
    assert (world.received, world.marks) == ([7, 8], {"b.0": 1, "a.0": 1})


async def test_the_spool_of_a_living_actor_is_not_touched(world: World) -> None:
    living = world.outbox()
    await living.send(make_group(0))
    assert world.orphans() == []


async def test_a_damaged_file_is_left_out(world: World) -> None:
    dead = world.outbox()
    await dead.send(make_group(0))
    abandon(dead)
    (world.root / "a.0" / "2.group").write_bytes(b"damaged")
    (orphan,) = world.orphans()
    assert orphan.unconfirmed == 1


async def test_a_finished_run_leaves_nothing_on_the_disk(world: World) -> None:
    outbox = world.outbox()
    await outbox.send(make_group(0))
    await outbox.close(is_run_finished=True)
    assert list(world.root.iterdir()) == []


async def test_unconfirmed_groups_stay_on_the_disk(world: World, caplog: pytest.LogCaptureFixture) -> None:
    outbox = world.outbox()
    await outbox.send(make_group(0))
    await outbox.close(is_run_finished=False)
    assert files(world.root) == ["a.0/1.group"]
    assert "1 groups are not confirmed" in caplog.text


async def test_numbers_that_nobody_has_any_more_need_a_new_producer(world: World) -> None:
    outbox = world.outbox()
    for index in range(3):
        await outbox.send(make_group(index))
        if index == 1:
            world.commit()
            await outbox.poll()
    # Redis and the learner's disk are gone; a new learner starts under the old run id.
    world.marks = {}
    world.lose_everything()
    outbox._outage_s = 0.01
    await outbox.poll()
    world.commit()
    assert world.marks == {"a.1": 1}
    assert world.received == [0, 1, 2]
    await outbox.send(make_group(3))
    world.commit()
    assert world.marks == {"a.1": 2}
    assert files(world.root) == ["a.1/2.group"]
