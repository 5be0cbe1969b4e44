"""From a row to the token ids that the policy continues; learner and actors must agree on every one."""

from typing import Protocol

from lambdapo_async.config import RunConfig
from lambdapo_async.errors import ConfigError
from lambdapo_async.tasks.interface import Row, Task


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that prompts need."""

    @property
    def chat_template(self) -> str | None:
        """Template of a conversation; None for a model without chat."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of ``text``."""

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, add_generation_prompt: bool, tokenize: bool
    ) -> str:
        """The conversation's text, ready for the model's answer."""


class PromptEncoder:
    """Renders rows and turns them into token ids."""

    def __init__(self, tokenizer: Tokenizer, task: Task, config: RunConfig) -> None:
        """``ConfigError`` when ``task.chat`` asks for a chat template that the tokenizer has not."""
        self._tokenizer, self._task = tokenizer, task
        self._chat = config.task.kind == "jsonl" and config.task.chat
        if self._chat and not tokenizer.chat_template:
            raise ConfigError(
                f"task.chat = true, but the tokenizer of {config.model.path} has no chat template: "
                "set task.chat = false or use a model with one"
            )
        self.max_tokens = config.model.max_length - config.sampling.max_tokens
        """Longest prompt that leaves room for ``sampling.max_tokens``."""

    def encode(self, row: Row) -> list[int]:
        """[P] token ids of the prompt."""
        text = self._task.render(row)
        if not self._chat:
            return self._tokenizer.encode(text, add_special_tokens=True)
        # The template writes the special tokens itself.
        conversation = [{"role": "user", "content": text}]
        rendered = self._tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        return self._tokenizer.encode(rendered, add_special_tokens=False)

    def fits(self, row: Row) -> bool:
        """Whether the prompt is not empty and leaves room for the longest completion."""
        return 0 < len(self.encode(row)) <= self.max_tokens
