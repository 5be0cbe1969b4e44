"""The learner's journal: what it received and what it trained on, durable before anyone is told.

Crash log, recipe of the replay queue and recorded run in one (docs/decisions/0008).
"""
