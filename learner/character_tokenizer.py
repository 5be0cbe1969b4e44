"""A tokenizer of single characters, in Hugging Face's format."""

from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

PAD, EOS, UNKNOWN = "<|pad|>", "<|eos|>", "<|unk|>"
CHARACTERS = "\n" + "".join(map(chr, range(0x20, 0x7F)))
"""Newline and printable ASCII; every other character becomes ``UNKNOWN``."""


def build_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """Three special tokens, then one token per character of ``CHARACTERS``; round-trips any text of those.

    Args:
        max_length: the model's context in tokens, written into the tokenizer's config.
    """
    vocab = {token: token_id for token_id, token in enumerate([PAD, EOS, UNKNOWN, *CHARACTERS])}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
