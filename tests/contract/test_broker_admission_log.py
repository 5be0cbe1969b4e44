"""What an actor's questions at a closed gate cost the server."""

import redis

from lambdapo_async.broker.redis_run import RedisRun
from tests.contract.broker_world import start


def test_a_refused_lease_writes_nothing(redis_run: RedisRun, server: redis.Redis) -> None:
    start(redis_run)
    admission = redis_run.admission("a")
    while admission.lease(4):
        pass
    before = server.info("persistence")["rdb_changes_since_last_save"]
    assert admission.lease(4) == ()
    assert server.info("persistence")["rdb_changes_since_last_save"] == before
