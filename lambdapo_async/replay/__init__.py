"""The replay queue: which groups a step trains on, how often, and how fast (docs/algorithm.md, section 4)."""
