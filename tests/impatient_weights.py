"""A weight store whose readers wait for a moment only."""

from lambdapo_async.broker.interface import WeightStore


class ImpatientWeights:
    """``store`` with short waits, so that a cancelled follower's thread ends soon."""

    def __init__(self, store: WeightStore) -> None:
        self._store = store
        self.fetch, self.head, self.files, self.publish = store.fetch, store.head, store.files, store.publish

    def wait_newer(self, than: int, *, timeout_s: float) -> int | None:
        return self._store.wait_newer(than, timeout_s=min(timeout_s, 0.02))
