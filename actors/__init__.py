"""Actor processes: sample rollout groups with vLLM and follow the weights."""
