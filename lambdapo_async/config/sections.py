"""The sections of a run's configuration, in the order in which data meets them.

Every field has its unit and default here; ``lambdapo config`` prints them resolved.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, SecretStr

from lambdapo_async.seal import MIN_KEY_LENGTH


class Section(BaseModel):
    """Base of all sections: frozen, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


class ModelConfig(Section):
    """Which causal language model is trained."""

    path: str
    """Hugging Face repo id, a local folder in its format, or ``starter`` (built once from the task)."""
    revision: str | None = None
    """Branch, tag or commit of a repo id; None is its default branch."""
    max_length: PositiveInt = 4096
    """Context in tokens: prompt plus completion."""


class ArithmeticTask(Section):
    """Built-in column addition with written working and reference solutions."""

    kind: Literal["arithmetic"] = "arithmetic"
    """Chooses the task."""
    num_train: PositiveInt = 20_000
    """Training rows generated from the run's seed."""
    num_heldout: PositiveInt = 256
    """Held-out rows; none of them is a training row."""
    digits: PositiveInt = 3
    """Digits of each summand."""


class JsonlTask(Section):
    """Rows of JSON-lines files."""

    kind: Literal["jsonl"]
    """Chooses the task."""
    train_path: Path
    """File of the training rows."""
    heldout_path: Path
    """File of the held-out rows."""
    prompt_field: str = "question"
    """Field with the prompt's text."""
    answer_field: str = "answer"
    """Field with the reference answer."""
    solution_field: str | None = None
    """Field with a reference solution, for the density reward; may be the answer field."""
    answer_format: Literal["plain", "gsm8k"] = "plain"
    """``gsm8k``: the final answer follows ``####`` in the answer field."""
    template: str = Field("{prompt}", pattern=r"\{prompt\}")
    """Prompt text sent to the model; ``{prompt}`` is replaced by the row's."""
    chat: bool = False
    """Render the prompt through the tokenizer's chat template."""
    rewards: tuple[str, ...] = Field(("math",), min_length=1)
    """Verifiable reward functions by registered name (``math``, ``exact``) or dotted path; their product is V.
    Learner and actors import a dotted path: whoever may write the run's config in Redis chooses code they run."""
    max_rows: PositiveInt | None = None
    """Use only the first rows of each file; None is all."""


TaskConfig = Annotated[ArithmeticTask | JsonlTask, Field(discriminator="kind")]


class DensityConfig(Section):
    """Semantic density reward: R = V + lam * (1 - V) * density (docs/algorithm.md, section 3)."""

    gate: Literal["off", "wrong", "always"] = "off"
    """``wrong``: only what V leaves open is rewarded; ``always``: R = V + lam * density."""
    lam: float = Field(0.1, ge=0.0, le=1.0)
    """Weight of the density."""
    metric: Literal["numbers", "rouge_l", "multiset"] = "numbers"
    """F1 between reasoning trace and reference solution."""
    min_reference_tokens: PositiveInt = 8
    """A shorter reference solution gives no density (counted)."""


class SamplingConfig(Section):
    """How the behavior policy samples."""

    temperature: PositiveFloat = 1.0
    """Softmax temperature; the recorded log-probabilities include it."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Nucleus mass; other than 1 biases the ratio."""
    top_k: int = Field(-1, ge=-1)
    """Most likely tokens kept; -1 is all, anything else biases the ratio."""
    max_tokens: PositiveInt = 1024
    """Completion tokens at most."""


class RolloutConfig(Section):
    """What a step is made of."""

    group_size: PositiveInt = 8
    """Rollouts per prompt (G)."""
    groups_per_step: PositiveInt = 16
    """Groups of one optimizer step."""
    filter_zero_variance: bool = True
    """Leave out groups whose rewards are all equal: they carry no gradient."""


class StalenessConfig(Section):
    """How old a group may be, in versions: learner version minus oldest producing version."""

    max_staleness: int = Field(2, ge=0)
    """Admission: at most (this + 1) steps' groups are in flight; 0 samples a step's groups after the last update."""
    drop_above: PositiveInt = 16
    """Last resort: an older group is dropped and counted."""


class EvaluationConfig(Section):
    """Held-out evaluation by the actors, on the verifiable reward alone."""

    every_steps: int = Field(20, ge=0)
    """Steps between evaluations; 0 is never."""
    num_prompts: PositiveInt = 64
    """Held-out rows asked each time, the first ones."""
    target: float | None = None
    """Stop the run when the mean held-out reward reaches this."""


class BrokerConfig(Section):
    """Redis, the only meeting point of the processes."""

    url: str = "redis://127.0.0.1:6379/0"
    """Also from ``--redis-url`` or REDIS_URL; never published, its password never logged."""
    hmac_key: SecretStr | None = Field(None, min_length=MIN_KEY_LENGTH)
    """Signs groups, weight manifests and the run's config; also from LAMBDAPO_HMAC_KEY, which every actor needs then.
    At least 16 characters; never published, never logged."""
    max_groups: PositiveInt = 4096
    """Groups in the queue; they leave it as soon as the learner's disk holds them."""
    max_bytes: PositiveInt = 2 * 1024**3
    """Payload bytes in the queue."""
    lease_s: PositiveFloat = 60.0
    """A lease not renewed for this long goes to another actor."""
    heartbeat_s: PositiveFloat = 2.0
    """Seconds between an actor's heartbeats (each renews its leases)."""
    timeout_s: PositiveFloat = 30.0
    """Deadline of one Redis call, retries included."""
    outage_s: PositiveFloat = 600.0
    """Seconds without Redis, or with one that keeps losing data, after which a process gives up; an actor waits as long
    for a learner that gives no sign of life."""


class ActorConfig(Section):
    """What every actor of the run does alike."""

    max_groups_in_flight: PositiveInt = 64
    """Groups an actor holds at most; how many it does hold follows its speed."""
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    """The engine's compute type."""
    quantization: Literal["fp8_per_channel"] | None = None
    """What the engine makes of the linear layers' weights, of every version anew; the learner's stay as they are."""
    max_num_seqs: PositiveInt = 128
    """Sequences that the engine runs at once."""
    kv_cache_gib: PositiveFloat | None = None
    """Memory of the KV cache; None leaves it to vLLM on a GPU and is 0.25 on a CPU."""
    gpu_memory_utilization: float = Field(0.9, gt=0.0, le=1.0)
    """Share of GPU memory that vLLM may take."""
    tensor_parallel_size: PositiveInt = 1
    """GPUs of one actor's engine."""
    group_timeout_s: PositiveFloat = 1800.0
    """Deadline of sampling one group; after it the engine counts as hung and the actor ends."""
    reward_timeout_s: PositiveFloat = 20.0
    """Deadline of scoring one group; its rewards are 0 then (counted)."""
    update_mode: Literal["in_flight", "between_groups"] = "in_flight"
    """``in_flight``: running groups go on under new weights; ``between_groups``: new weights wait for them to end."""
    stale_kv: bool = False
    """Keep the KV cache at an update: no context is computed anew, but running groups go on in a context that older
    weights made. Recorded log-probabilities stay those of the sampling; no later group sees the old context."""
    mirror: Literal["ram", "disk"] = "ram"
    """Where an actor keeps its copy of the newest weights, as large as the published ones: ``ram`` is /dev/shm,
    ``disk`` the folder that TMPDIR names, else /tmp. Where that is a tmpfs, ``disk`` is memory too: let TMPDIR name a
    folder on a disk."""
    canary_minutes: PositiveFloat = 10.0
    """Minutes between two comparisons of an actor's log-probabilities with the learner's; the first comes before it
    samples anything."""
    spool_dir: Path | None = None
    """Where an actor keeps groups until the learner holds them; None is a folder of the user's in the folder that
    TMPDIR names. The next actor of the run on the same machine sends what a dead one left there."""
    drain_s: PositiveFloat = 30.0
    """After SIGTERM unfinished groups get this long before their leases are handed back."""
    handoff: bool = False
    """Hand back what was sampled of those groups, too: the next actor continues them instead of starting anew."""
