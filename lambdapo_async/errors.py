"""Every error this project raises on purpose.

LambdaPOError
├── UserError             the user can fix it: one line, exit code 2
│   ├── ConfigError       a config key, value or combination of values
│   ├── TaskError         a dataset or reward that cannot be used
│   └── DiskError         a file that the disk refused
├── WireFormatError       bytes that are not a rollout group we understand
├── BrokerError           Redis answered something the protocol does not allow
│   ├── BrokerUnavailable Redis did not answer before the deadline
│   │   └── BrokerUnreachableError  it did not answer our first call (a UserError too)
│   ├── LostDataError     Redis restarted, went back in time or lost something: initialise it again
│   ├── FencedError       another learner owns the run now
│   └── RunNotFoundError  this Redis holds no such run, or one of another schema
│       └── RunNotPublishedError  it is not there yet, or not all of it
├── NoGroupsError         no rollout group came before the learner's deadline
├── WeightsError          a weight version that is missing, damaged or of another model
│   └── WeightsGoneError  one that was there: deleted, or replaced by a newer file
│       └── WeightsLostError  Redis lost a part of it, which its learner notices
├── CheckpointError       a checkpoint that is missing or damaged
├── RankLostError         another process of the same learner died or does not answer
└── EngineError           the inference engine died or refused a request
"""


class LambdaPOError(Exception):
    """Base of all errors raised on purpose."""


class UserError(LambdaPOError):
    """The user can fix it; ``__main__`` prints the message alone and exits with 2."""


class ConfigError(UserError):
    """A config key, value or combination of values is wrong."""


class TaskError(UserError):
    """A dataset or reward function cannot be used."""


class WireFormatError(LambdaPOError):
    """Bytes that are not a rollout group we understand; the entry is quarantined."""


class BrokerError(LambdaPOError):
    """Redis answered something that the protocol does not allow."""


class BrokerUnavailable(BrokerError):  # noqa: N818 - a condition, not a fault
    """Redis did not answer before the deadline."""


class BrokerUnreachableError(BrokerUnavailable, UserError):
    """Redis did not answer the first call of this process: the URL is wrong, or it does not run."""


class LostDataError(BrokerError):
    """Redis restarted, went back in time, came back empty or lost a part: its owner must initialise it again."""


class FencedError(BrokerError):
    """Another learner owns the run now; this one must stop."""


class RunNotFoundError(BrokerError, UserError):
    """This Redis holds no such run, or one whose schema we do not know."""


class RunNotPublishedError(RunNotFoundError):
    """This Redis holds no such run, or not all of it: its learner may be about to publish it."""


class NoGroupsError(LambdaPOError):
    """No rollout group came before the learner's deadline."""


class WeightsError(LambdaPOError):
    """A weight version is missing, damaged or of another model."""


class WeightsGoneError(WeightsError):
    """A weight file was deleted, or replaced by a newer one, before a reader had it; no word of damage."""


class WeightsLostError(WeightsGoneError):
    """Redis lost a part of what it was given of the weights; the learner notices, and publishes them again."""


class CheckpointError(UserError):
    """A checkpoint is missing or damaged."""


class DiskError(UserError):
    """The disk refused a file that is neither checkpoint nor journal: it is full, read-only or broken."""


class RankLostError(LambdaPOError):
    """Another process (rank) of the same learner died or does not answer; all of them must stop."""


class EngineError(LambdaPOError):
    """The inference engine died or refused a request."""
