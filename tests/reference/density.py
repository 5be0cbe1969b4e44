"""Longest common subsequence by the textbook's table."""

from collections.abc import Sequence


def common_subsequence(ours: Sequence[str], theirs: Sequence[str]) -> int:
    table = [[0] * (len(theirs) + 1) for _ in range(len(ours) + 1)]
    for i, left in enumerate(ours):
        for j, right in enumerate(theirs):
            table[i + 1][j + 1] = table[i][j] + 1 if left == right else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]
