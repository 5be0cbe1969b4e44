"""The learner's section: optimizer, memory and process."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from lambdapo_async.config.sections import Section

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class LoraConfig(Section):
    """Low-rank adapters (arXiv:2106.09685); without dropout, for log pi must be the distribution that is published."""

    rank: int = Field(16, ge=1, le=512)
    """Rows of A and columns of B; vLLM takes no more than 512."""
    alpha: PositiveFloat = 32.0
    """The product B A is scaled by alpha / rank."""
    target_modules: tuple[str, ...] = ()
    """Last name components of the linear layers that get an adapter; empty is all but the output layer."""


class LearnerConfig(Section):
    """The optimizer and its process."""

    num_steps: PositiveInt = 1000
    """Optimizer steps of the run."""
    lr: PositiveFloat = 1e-6
    """AdamW's learning rate after warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Updates of linear warm-up from lr / warmup_steps."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After warm-up; ``linear`` and ``cosine`` reach 0 at the end of the run."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW's betas, each in [0, 1)."""
    weight_decay: float = Field(0.0, ge=0.0)
    """AdamW's decoupled weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Global gradient norm above which gradients are scaled down."""
    minibatches: PositiveInt = 1
    """Optimizer updates per pass over a step's groups; above 1 the loss needs a trust region."""
    epochs: PositiveInt = 1
    """Passes over a step's groups."""
    micro_batch_tokens: PositiveInt = 16_384
    """Token budget of one forward and backward."""
    context_parallel: PositiveInt = 1
    """Ranks that share each sequence (arXiv:2309.14509); must divide the ranks and the model's heads."""
    lora: LoraConfig | None = None
    """Train adapters only; None trains every weight."""
    router_aux_coef: float = Field(0.0, ge=0.0)
    """Weight of the load-balancing loss of a mixture of experts (arXiv:2101.03961), over all completions of an update,
    which takes a forward pass more; 0 leaves it out."""
    activation_checkpointing: bool = False
    """Keep only each layer's input and compute the rest, logits too, again in the backward pass."""
    activation_offload: bool = False
    """Keep those inputs in the host's memory; needs ``activation_checkpointing``."""
    optimizer_offload: bool = False
    """Keep masters and moments in the host's memory, where AdamW then runs."""
    compile: bool = False
    """Compile each layer with ``torch.compile``."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto``: CUDA where there is a device."""
    num_threads: int | None = Field(None, ge=1, le=1024)
    """CPU threads of torch; None leaves torch's default."""
    checkpoint_every: PositiveInt = 20
    """Steps between checkpoints."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints kept."""
    record: bool = False
    """Keep the whole journal, every group included, so that ``lambdapo replay`` can train on it again; without it the
    journal begins where the oldest kept checkpoint needs it."""
    data_timeout_s: PositiveFloat = 600.0
    """The learner stops with an error after this long without a group."""

    @property
    def num_updates(self) -> int:
        """Optimizer updates of the whole run."""
        return self.num_steps * self.minibatches * self.epochs

    @model_validator(mode="after")
    def _check_offload(self) -> Self:
        if self.activation_offload and not self.activation_checkpointing:
            raise ValueError(
                "activation_offload moves what activation_checkpointing keeps: set activation_checkpointing = true, too"
            )
        return self
