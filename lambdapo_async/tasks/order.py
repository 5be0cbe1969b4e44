"""Which row a training lease asks for: seeded, epoch-wise, without a skip or a repeat in an epoch."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


def row_of(index: int, *, num_rows: int, seed: int) -> int:
    """Row of training index ``index``: position ``index % num_rows`` of epoch ``index // num_rows``'s shuffle."""
    return int(_shuffle(index // num_rows, num_rows, seed)[index % num_rows])


@lru_cache(maxsize=4)
def _shuffle(epoch: int, num_rows: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(num_rows)
