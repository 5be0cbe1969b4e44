"""Semantic density: reward for reasoning like a reference solution (docs/algorithm.md, section 3).

Every metric is the F1 of precision and recall, never recall alone: recall rewards repetition.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

from rapidfuzz.distance import LCSseq

from lambdapo_async.config.sections import DensityConfig

Metric = Literal["numbers", "rouge_l", "multiset"]

_WORD = re.compile(r"[^\W_]+")
_NUMBER = re.compile(r"\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?")
_CALCULATOR = re.compile(r"<<[^<>\n]*>>")
_FINAL_ANSWER = re.compile(r"\s*(####|A:|(the )?(final )?answer( is|:))|.*\\boxed\s*\{", re.IGNORECASE)


def semantic_density(completion: str, solution: str | None, config: DensityConfig) -> float | None:
    """Density of one completion in [0, 1].

    None when the gate is off, there is no reference, or its trace has fewer than ``min_reference_tokens`` words: too
    little to be like.
    """
    if config.gate == "off" or solution is None:
        return None
    if len(_words(reasoning_trace(solution))) < config.min_reference_tokens:
        return None
    return density(completion, solution, metric=config.metric)


def combine(verifiable: float, density: float | None, config: DensityConfig) -> float:
    """The trained reward: R = V + lam (1 - V) density with gate ``wrong``, V + lam density with ``always``, else V."""
    if density is None or config.gate == "off":
        return verifiable
    opening = 1.0 if config.gate == "always" else 1.0 - verifiable
    return verifiable + config.lam * opening * density


def density(completion: str, solution: str, *, metric: Metric) -> float:
    """F1 between the reasoning traces of two texts, in [0, 1]; 0 when either has nothing to compare.

    Args:
        completion: what the policy wrote.
        solution: the reference with its working.
        metric: ``numbers``: multiset of the numbers (unsigned, 1,000 = 1000.0); ``multiset``: multiset of the
            lower-case words; ``rouge_l``: longest common subsequence of the same words (Lin 2004).
    """
    tokenize, num_common = _METRICS[metric]
    ours, theirs = tokenize(reasoning_trace(completion)), tokenize(reasoning_trace(solution))
    if not ours or not theirs:
        return 0.0
    # 2PR / (P + R) with P = common / len(ours) and R = common / len(theirs)
    return 2 * num_common(ours, theirs) / (len(ours) + len(theirs))


def reasoning_trace(text: str) -> str:
    r"""``text`` without its final-answer line and without GSM8K's calculator annotations (``<<2*3=6>>``).

    The final-answer line is the last line that is not blank, when it begins with ``####``, ``A:``, ``Answer:``,
    ``Final answer:`` or ``The answer is`` (case ignored), or holds ``\boxed{``. Annotations only repeat what is
    written beside them.
    """
    body = text.rstrip()
    start = body.rfind("\n") + 1
    return _CALCULATOR.sub("", body[:start] if _FINAL_ANSWER.match(body, start) else body)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _numbers(text: str) -> list[str]:
    return [_canonical(number) for number in _NUMBER.findall(text)]


def _canonical(number: str) -> str:
    """``1,000.50`` -> ``1000.5``, ``007`` -> ``7.``: no float, because digits of a completion may have any length."""
    whole, _, fraction = number.replace(",", "").partition(".")
    return f"{whole.lstrip('0')}.{fraction.rstrip('0')}"


def _common_multiset(ours: Sequence[str], theirs: Sequence[str]) -> int:
    return (Counter(ours) & Counter(theirs)).total()


def _common_subsequence(ours: Sequence[str], theirs: Sequence[str]) -> int:
    """Length of the longest common subsequence, bit-parallel on integer ids: no two words share one."""
    ids: dict[str, int] = {}
    ours_ids, theirs_ids = ([ids.setdefault(word, len(ids)) for word in words] for words in (ours, theirs))
    return LCSseq.similarity(ours_ids, theirs_ids)


_METRICS: dict[Metric, tuple[Callable[[str], list[str]], Callable[[Sequence[str], Sequence[str]], int]]] = {
    "numbers": (_numbers, _common_multiset),
    "multiset": (_words, _common_multiset),
    "rouge_l": (_words, _common_subsequence),
}
