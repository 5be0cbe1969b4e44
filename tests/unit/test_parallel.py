import os
import signal
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from lambdapo_async.errors import ConfigError
from lambdapo_async.packing import MicroBatch
from learner.activations import enable_checkpointing
from learner.logprobs import LogprobModel
from learner.parallel import ALONE, Ranks, join_ranks, share_sequences
from learner.sharding import full_tensors, shard, whole_tensor
from tests.ranks import alone, run_ranks
from tests.tiny_models import Architecture, micro_batch, tiny_model

NUM_UPDATES = 3


def batches() -> list[MicroBatch]:
    """Four of very different sizes; the last has no loss, as one that only fills up a rank's share."""
    filler = micro_batch((3,), prompt=99, seed=3)
    return [micro_batch((9, 6), seed=0), micro_batch((4,), seed=1), micro_batch((12, 5, 3), seed=2), filler]


def share_of(ranks: Ranks) -> list[MicroBatch]:
    return batches()[ranks.rank :: ranks.world_size]


def trained(ranks: Ranks, architecture: Architecture, recomputed: bool) -> dict[str, object]:
    """A few updates as the policy takes them; what they leave behind, whole."""
    model = tiny_model(architecture)
    if recomputed:
        enable_checkpointing(model)
    module = LogprobModel(model, temperature=0.9)
    shard(module, model, ranks)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0.1, fused=True)
    norms, gradients = [], {}
    for _ in range(NUM_UPDATES):
        for batch in share_of(ranks):
            logprobs_T, entropy_T = module(batch)
            loss = -(logprobs_T * batch.advantages_T + 0.01 * entropy_T)[batch.loss_mask_T].sum() / 30
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 0.5)
        norms.append(float(whole_tensor(norm)))
        gradients = dict(full_tensors(((name, p.grad) for name, p in parameters.items()), ranks))
        with torch.no_grad():  # as for a reference policy; leaves nothing behind that the update makes stale
            module(share_of(ranks)[0])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        final, _ = module(batches()[0])
    weights = dict(full_tensors(parameters.items(), ranks))
    return {"norms": norms, "gradients": gradients, "weights": weights, "logprobs": final}


def sliced_bytes(ranks: Ranks) -> int:
    """Bytes of parameters that this rank holds between two steps."""
    model = tiny_model("llama")
    module = LogprobModel(model, temperature=1.0)
    shard(module, model, ranks)
    module(batches()[0])[0].sum().backward()
    return sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in model.parameters())


@pytest.mark.parametrize(("architecture", "recomputed"), [("qwen3", False), ("llama", False), ("qwen3", True)])
def test_the_gradient_of_two_ranks_is_that_of_one(tmp_path: Path, architecture: Architecture, recomputed: bool) -> None:
    """With tied embeddings, with untied ones, and with layers that are recomputed in the backward pass."""
    expected = alone(trained, architecture, recomputed)
    main, other = run_ranks(tmp_path, 2, trained, architecture, recomputed)
    assert isinstance(expected, dict)
    assert isinstance(main, dict)
    assert isinstance(other, dict)
    assert set(main["gradients"]) == set(dict(tiny_model(architecture).named_parameters()))
    torch.testing.assert_close(main["norms"], expected["norms"], rtol=1e-5, atol=0)
    torch.testing.assert_close(main["gradients"], expected["gradients"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(main["weights"], expected["weights"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(main["logprobs"], expected["logprobs"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(other["logprobs"], main["logprobs"], rtol=0, atol=0)
    assert other["norms"] == main["norms"]
    assert other["weights"] == {}


def test_each_rank_holds_its_slice_only(tmp_path: Path) -> None:
    whole = alone(sliced_bytes)
    parts = run_ranks(tmp_path, 2, sliced_bytes)
    assert sum(parts) == whole  # type: ignore[arg-type]
    assert max(parts) < 0.6 * whole  # type: ignore[operator, type-var]


def talk(ranks: Ranks, large: int) -> list[object]:
    """What rank 1 heard, in order."""
    heard: list[object] = []
    if ranks.is_main:
        ranks.send(b"first")
        ranks.send(b"")  # a pulse
        ranks.send(bytes(range(256)) * large)
    else:
        heard.append(ranks.receive().decode())
        heard.append(ranks.receive() == bytes(range(256)) * large)
    heard.append(ranks.share(f"from {ranks.rank}".encode()).decode())
    heard.append(ranks.add_up({"b": 1.0 + ranks.rank, "a": 0.5}))
    columns = [torch.arange(3.0), torch.arange(0.0)] if ranks.is_main else [torch.ones(1), torch.ones(4)]
    heard.append([[column.tolist() for column in each] for each in ranks.collect(columns)])
    ranks.wait_for_all()
    return heard


def test_messages_arrive_whole_and_in_order(tmp_path: Path) -> None:
    sums = {"a": 1.0, "b": 3.0}
    columns = [[[0.0, 1.0, 2.0], []], [[1.0], [1.0] * 4]]
    heard = run_ranks(tmp_path, 2, talk, 4096)
    assert heard == [["from 0", sums, columns], ["first", True, "from 0", sums, columns]]


def meet_in_pairs(ranks: Ranks) -> list[object]:
    """What four ranks, two and two of which share sequences, know of each other."""
    paired = share_sequences(ranks, 2)
    assert paired.context is not None
    assert paired.context.rank() == ranks.rank % 2
    sums = paired.add_up({"tokens": 10.0 ** (ranks.rank // 2)})
    columns = [[column.tolist() for column in each] for each in paired.collect([torch.ones(1 + ranks.rank // 2)])]
    return [paired.num_shares, paired.share_index, sums, columns]


def test_ranks_that_share_sequences_count_once(tmp_path: Path) -> None:
    for rank, known in enumerate(run_ranks(tmp_path, 4, meet_in_pairs)):
        assert known == [2, rank // 2, {"tokens": 11.0}, [[[1.0]], [[1.0, 1.0]]]]


@pytest.mark.parametrize("ranks", [ALONE, Ranks(world_size=3)])
def test_ranks_that_cannot_be_paired_are_an_error(ranks: Ranks) -> None:
    message = rf"learner.context_parallel = 2 does not divide the {ranks.world_size} rank\(s\)"
    with pytest.raises(ConfigError, match=message):
        share_sequences(ranks, 2)


def test_a_process_alone_opens_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join_ranks(torch.device("cpu")) as ranks:
        assert not torch.distributed.is_initialized()
        assert ranks.is_main
        ranks.send(b"nobody hears this")
        ranks.pulse()
        ranks.wait_for_all()
        assert ranks.share(b"mine") == b"mine"
        assert ranks.add_up({"x": 2.0}) == {"x": 2.0}
        assert [[column.tolist() for column in each] for each in ranks.collect([torch.ones(2)])] == [[[1.0, 1.0]]]


def lose(ranks: Ranks, lost: int) -> None:
    """One rank is killed while the others wait for its message or its arrival."""
    if ranks.rank == lost:
        os.kill(os.getpid(), signal.SIGKILL)
    if lost == 0:
        ranks.receive()
    ranks.wait_for_all()


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_rank_ends_the_others_at_once(tmp_path: Path, lost: int) -> None:
    with pytest.raises(AssertionError, match=f"rank {1 - lost} failed(?s:.*)RankLostError: another rank"):
        run_ranks(tmp_path, 2, lose, lost, killed=[lost])
