"""Fixtures of the whole suite, and the threads that keep two cores from fighting."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

pytest_plugins = ["tests.engine_fixtures", "tests.follower_fixtures", "tests.redis_fixtures"]
