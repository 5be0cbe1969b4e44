"""What is let in: signed groups of welcome actors; the rest is kept aside and journaled as discarded."""

from lambdapo_async.broker.interface import Delivery, Descriptor
from lambdapo_async.config import RunConfig
from lambdapo_async.journal.records import GroupRecord
from lambdapo_async.rollout import RolloutGroup
from lambdapo_async.seal import Seal
from lambdapo_async.wire import GROUP, encode_group
from learner.arrivals import MALFORMED, QUARANTINED, Screen
from tests.groups import VOCAB_SIZE, make_group

CONFIG = RunConfig.model_validate(
    {"model": {"path": "starter"}, "task": {"kind": "arithmetic"}, "rollout": {"group_size": 2}}
)
SEAL = Seal("sixteen letters!", run_id="run")


class NotActorB:
    def __init__(self) -> None:
        self.asked = 0

    def welcomes(self, group: RolloutGroup) -> bool:
        self.asked += 1
        return group.actor_id != "b"


def delivery(group: RolloutGroup, seal: Seal | None = None) -> Delivery:
    payload = encode_group(group)
    payload = payload if seal is None else seal.close(payload, purpose=GROUP)
    return Delivery(Descriptor("p.0", 1, group.lease, 0, len(payload), 0.5), payload)


def test_groups_of_an_actor_that_is_set_aside_are_discarded_for_good() -> None:
    doorkeeper = NotActorB()
    screen = Screen(CONFIG, vocab_size=VOCAB_SIZE, doorkeeper=doorkeeper)
    welcome = screen.examine(delivery(make_group(0, actor_id="a")), newest_version=5)
    assert (welcome.record.discarded, welcome.problem) == ("", "")
    unwelcome = screen.examine(delivery(make_group(1, actor_id="b")), newest_version=5)
    assert unwelcome.record == GroupRecord(delivery(make_group(1, actor_id="b")).descriptor, b"", QUARANTINED)
    assert unwelcome.problem == "its actor b is set aside"
    assert doorkeeper.asked == 2
    restored = screen.restore(7, unwelcome.record)
    assert (restored.received, restored.record.discarded, doorkeeper.asked) == (None, QUARANTINED, 2)


def test_only_signed_groups_are_let_in_where_groups_are_signed() -> None:
    screen = Screen(CONFIG, vocab_size=VOCAB_SIZE, seal=SEAL)
    group = make_group(0)
    signed = screen.examine(delivery(group, SEAL), newest_version=5)
    assert signed.record.payload == encode_group(group), "the journal needs no key to be read"
    for foreign in (delivery(group), delivery(group, Seal("another key of 16", run_id="run"))):
        verdict = screen.examine(foreign, newest_version=5)
        assert (verdict.record.discarded, verdict.record.payload, verdict.group) == (MALFORMED, b"", None)
        assert "sign" in verdict.problem
    unsigned = Screen(CONFIG, vocab_size=VOCAB_SIZE)
    assert "set LAMBDAPO_HMAC_KEY" in unsigned.examine(delivery(group, SEAL), newest_version=5).problem
