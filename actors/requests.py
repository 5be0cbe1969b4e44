"""What every engine refuses before it samples."""

from collections.abc import Sequence

from lambdapo_async.errors import EngineError

NO_WEIGHTS = "the engine has no weights yet: call load_weights first"


def check_request(prompt_ids: Sequence[int], *, size: int, max_tokens: int, max_length: int) -> None:
    """``EngineError`` unless there is something to do and the longest completion fits.

    Args:
        prompt_ids: [P] token ids.
        size: completions asked for.
        max_tokens: completion tokens at most.
        max_length: context of the model in tokens.
    """
    num_tokens = len(prompt_ids)
    if size < 1:
        raise EngineError(f"asked for {size} completions: ask for at least 1")
    if num_tokens == 0:
        raise EngineError("the prompt is empty: an engine needs at least one token to continue")
    if num_tokens + max_tokens > max_length:
        raise EngineError(
            f"a prompt of {num_tokens} tokens and sampling.max_tokens = {max_tokens} exceed "
            f"model.max_length = {max_length} by {num_tokens + max_tokens - max_length}: shorten the prompt"
        )
