import numpy as np
import pytest

from benchmarks.model_shapes import STARTER
from benchmarks.weights.codec import check_same, longer, round_trip
from benchmarks.weights.encodings import all_encodings
from benchmarks.weights.updates import SHARE_AT_1E6, num_parameters, shaped_update
from lambdapo_async.weights.state import State
from tests.weight_states import POOL, as_reference, tensor_of

ENCODINGS = {encoding.name: encoding for encoding in all_encodings(POOL)}


@pytest.mark.parametrize("name", ENCODINGS)
def test_every_encoding_gives_the_same_bits(name: str) -> None:
    rng = np.random.default_rng(0)
    old = State(1, {key: tensor_of(rng.integers(0, 2**16, 70_000)) for key in ("a", "b", "same")})
    new = old.copy()
    new.version = 2
    new.tensors["a"].bits[[0, 300, 69_999]] += 1
    new.tensors["b"].bits[:] = rng.integers(0, 2**16, 70_000)
    for key in ("a", "b"):
        new.forget_digest(key)
    before = as_reference(old)
    round_trip(ENCODINGS[name], old, new)
    round_trip(ENCODINGS[name], longer(old, 2), longer(new, 2))
    assert as_reference(old) == before


def test_a_codec_that_loses_a_bit_ends_the_benchmark() -> None:
    old = State(1, {"a": tensor_of([1, 2])})
    with pytest.raises(SystemExit, match="not lossless"):
        check_same(ENCODINGS["full + zstd"], old, State(1, {"a": tensor_of([1, 3])}))


def test_a_shaped_update_changes_as_many_elements_as_a_trained_one() -> None:
    old, new = shaped_update(STARTER)
    assert old.numel == num_parameters(STARTER)
    changed = sum(np.count_nonzero(old.tensors[name].bits != tensor.bits) for name, tensor in new.tensors.items())
    assert changed / old.numel == pytest.approx(SHARE_AT_1E6, rel=0.05)
