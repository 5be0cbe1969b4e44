"""Asynchronous, streaming, off-policy RL for language models: the parts that own no process and no GPU."""
