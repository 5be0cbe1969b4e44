"""The learner's section: optimizer, memory and process."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from lambdapo_async.config.sections import Section

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class LearnerConfig(Section):
    """The optimizer and its process."""

    num_steps: PositiveInt = 1000
    """Optimizer steps of the run."""
    lr: PositiveFloat = 1e-6
    """AdamW's learning rate after warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up from lr / warmup_steps."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW's betas, each in [0, 1)."""
    weight_decay: float = Field(0.0, ge=0.0)
    """AdamW's decoupled weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Global gradient norm above which gradients are scaled down."""
    minibatches: PositiveInt = 1
    """Optimizer updates per step's groups; above 1 the loss needs a trust region."""
    micro_batch_tokens: PositiveInt = 16_384
    """Token budget of one forward and backward."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto``: CUDA where there is a device."""
    num_threads: PositiveInt | None = None
    """CPU threads of torch; None leaves torch's default."""
    checkpoint_every: PositiveInt = 20
    """Steps between checkpoints."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints kept."""
    data_timeout_s: PositiveFloat = 600.0
    """The learner stops with an error after this long without a group."""
