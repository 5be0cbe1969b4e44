r"""Final answers of mathematical texts: finding and comparing them.

A final answer follows ``####`` (GSM8K, arXiv:2110.14168), ``A:`` or ``the answer is`` on a line of its own, or stands
in ``\boxed{}``; without a mark it is the last number. Numbers are compared here, exactly; the rest by math-verify.
"""

import re
from collections.abc import Sequence
from fractions import Fraction

from lambdapo_async.tasks.interface import Row

MAX_ANSWER_CHARACTERS = 200
MAX_ANSWER_BRACKETS = 16
"""A final answer beyond either is wrong: parsing time grows faster than length, and exponentially with nesting."""
TIMEOUT_S = 2
"""math-verify's own deadline for parsing one answer, and for comparing two; by SIGALRM, so in a main thread only."""

_MARK = re.compile(r"^[ \t]*(?:####|A:|(?:the |final |the final )?answer(?: is:?|:))[ \t]*(\S.*)$", re.I | re.M)
_BOX = re.compile(r"\\boxed\s*\{")
_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+)?(?<=\d)"
_LAST_NUMBER = re.compile(rf"(?<![\w.])-?{_NUMBER}")
# One number with a sign and a currency before it and words after it: "$ 1,234.50 per day."
_QUANTITY = re.compile(rf"(-?)\s*\\?[$€£]?\s*(-?{_NUMBER})\s*\.?(?:\\?%|\s[^\d+*/^=\\_]*)?\.?")
# What sympy would compute for minutes in one call that no signal can interrupt: towers, and exponents above 99.
_POWER = r"(?:\^|\*\*)\s*"
_HUGE = re.compile(
    rf"{_POWER}[-({{\s]*\d{{3,}}|{_POWER}[\d.]+\s*{_POWER}|{_POWER}[({{][^)}}]*{_POWER}|(?:{_POWER}.*){{4}}|\d{{4}}\s*!|!\W*!"
)


def score_math(row: Row, completions: Sequence[str]) -> list[float]:
    """1 where the completion's final answer equals the row's, 0 elsewhere: 1,234 = 1234, $18 = 18.0, 1/2 = 0.5."""
    return [float(same_answer(row.answer, final_answer(completion))) for completion in completions]


def score_exact(row: Row, completions: Sequence[str]) -> list[float]:
    """1 where the completion, or its marked final answer, is the row's answer character for character."""
    expected = row.answer.strip()
    return [float(expected in (text.strip(), marked_answer(text))) for text in completions]


def final_answer(text: str) -> str | None:
    """The marked answer, or the last number; None where there is neither."""
    marked = marked_answer(text)
    if marked is not None:
        return marked
    numbers = [match.group() for match in _LAST_NUMBER.finditer(text) if match.group()]
    return numbers[-1] if numbers else None


def marked_answer(text: str) -> str | None:
    r"""What follows the last mark; otherwise what the last ``\boxed{}`` holds."""
    marks = _MARK.findall(text)
    if marks:
        return _unboxed(marks[-1]) or str(marks[-1]).strip()
    return _unboxed(text)


def same_answer(expected: str, found: str | None) -> bool:
    """Whether two final answers are mathematically equal; a found answer that cannot be read is not."""
    if found is None or len(found) > MAX_ANSWER_CHARACTERS:
        return False
    numbers = _number(expected), _number(found)
    if None not in numbers:
        return numbers[0] == numbers[1]
    if _HUGE.search(found) or sum(map(found.count, "([{")) > MAX_ANSWER_BRACKETS:
        return False
    return _same_expression(expected, found)


def _same_expression(expected: str, found: str) -> bool:
    from math_verify import parse, verify  # brings sympy: half a second that most tasks never need

    gold, answer = (parse(f"${text.strip().strip('$')}$", parsing_timeout=TIMEOUT_S) for text in (expected, found))
    return bool(verify(gold, answer, timeout_seconds=TIMEOUT_S))


def _unboxed(text: str) -> str | None:
    """Content of the last box, braces balanced; None without one that is closed."""
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    start, depth = boxes[-1].end(), 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position].strip()
    return None


def _number(text: str) -> Fraction | None:
    """The value of a text that is one number with at most a currency, a percent sign and words around it."""
    quantity = _QUANTITY.fullmatch(text.strip())
    if quantity is None:
        return None
    value = Fraction(quantity[2].replace(",", ""))
    return -value if quantity[1] else value
