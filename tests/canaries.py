"""A canary of a made-up model."""

from lambdapo_async.weights.canary import Canary, CanaryRow, ModelIdentity

FILES = {"config.json": b"{}", "tokenizer.json": b"t", "generation_config.json": b"g"}
IDENTITY = ModelIdentity.of(FILES)
CHECKSUM = "xxh3_128:" + "0" * 32
ROWS = (
    CanaryRow(prompt_ids=(1, 2), completion_ids=(3, 4, 5), logprobs=(-0.5, -1.0, -2.0)),
    CanaryRow(prompt_ids=(7,), completion_ids=(8,), logprobs=(0.0,)),
)


def canary_of(version: int = 3, *, dtype: str = "float32", checksum: str = CHECKSUM) -> Canary:
    return Canary(
        version=version,
        checksum=checksum,
        config_hash=IDENTITY.config_hash,
        tokenizer_hash=IDENTITY.tokenizer_hash,
        dtype=dtype,
        rows=ROWS,
    )
