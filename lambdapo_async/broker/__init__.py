"""The run's side of Redis: connection, leases, the rollout queue, the fleet."""
