"""A policy over several ranks: trained, checkpointed, resumed on another number of ranks; one rank is the oracle."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lambdapo_async.config import RunConfig
from lambdapo_async.errors import ConfigError
from lambdapo_async.journal.receipts import ReceiptsState
from lambdapo_async.weights.canary import Canary, ModelIdentity
from learner.canary import LearnerCanary, canary_sequence, score
from learner.checkpoint import CheckpointStore, LearnerState
from learner.crew import Crew, take_orders
from learner.crew_member import CrewMember, Origin, load_trainees
from learner.parallel import ALONE, Ranks, share_sequences
from learner.pool import PoolState
from learner.trainer import Trainer
from tests.fakes_canary import FakeCanaryStore
from tests.random_groups import received_groups
from tests.ranks import run_ranks
from tests.scripted_run import settings
from tests.tiny_models import VOCAB, tiny_model_folder

ROW = canary_sequence([3, 4, 5], [6, 7])
STATE = LearnerState(
    step=2, version=3, receipts=ReceiptsState(watermarks={"a": 4}, next_index=9), pool=PoolState(taken=9)
)
VARIANTS: Mapping[str, dict[str, object]] = {
    "plain": {},
    "kl and entropy": {"objective": {"kl": {"coefficient": 0.1}, "entropy_coefficient": 0.01}},
    "minibatches, proximal confidence": {
        "objective": {
            "policy_loss": {"preset": "decoupled"},
            "advantage": {"confidence_policy": "proximal"},
        },
        "learner": {"minibatches": 2},
    },
    "second moment": {"objective": {"policy_loss": {"preset": "m2po"}}},
    "recomputed": {"learner": {"activation_checkpointing": True}},
    "adapters": {"learner": {"lora": {"rank": 2}}},
    "balanced experts": {"learner": {"router_aux_coef": 0.1}},
}
Outcome = dict[str, object]


class Team:
    """What a rank trains with."""

    def __init__(self, ranks: Ranks, config: RunConfig, origin: Origin) -> None:
        torch.manual_seed(0)  # new adapters are drawn
        self.policy, reference = load_trainees(config, origin, ranks)
        self.trainer = Trainer(self.policy, config, reference, ranks)
        self.ranks, self.config = ranks, config

    def step(self, number: int) -> dict[str, float]:
        groups = received_groups(number, self.config, vocab=VOCAB)
        return self.trainer.step(groups, version=number).metrics

    def weights(self) -> dict[str, Tensor]:
        return {name: weight.clone() for name, weight in self.policy.named_weights()}


def train_variants(ranks: Ranks, model: Path) -> dict[str, Outcome]:
    """Two steps of each variant."""
    outcomes: dict[str, Outcome] = {}
    for name, changes in VARIANTS.items():
        path = model.with_name("experts") if "experts" in name else model
        team = Team(ranks, settings(**changes), Origin(str(path), None))
        metrics = [team.step(number) for number in range(2)]
        scored = score(team.policy, ROW)
        published = [dict(team.policy.published()) for _ in range(2)][-1]  # the frozen part is gathered once
        outcomes[name] = {"metrics": metrics, "scored": scored, "weights": team.weights(), "published": published}
    return outcomes


def train_variants_in_context(ranks: Ranks, model: Path, context_size: int) -> dict[str, Outcome]:
    """The same, neighbours sharing each sequence."""
    return train_variants(share_sequences(ranks, context_size), model)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, beside one of experts."""
    folder = tmp_path_factory.mktemp("models")
    tiny_model_folder(folder / "experts", "qwen3_moe")
    return tiny_model_folder(folder / "dense")


@pytest.fixture(scope="module")
def trained_alone(model: Path) -> dict[str, Outcome]:
    return train_variants(ALONE, model)


@pytest.mark.parametrize(("world_size", "context_size"), [(2, 1), (2, 2), (4, 2)])
def test_ranks_train_as_one(
    tmp_path: Path, model: Path, trained_alone: dict[str, Outcome], world_size: int, context_size: int
) -> None:
    first, *others = run_ranks(tmp_path, world_size, train_variants_in_context, model, context_size)
    assert isinstance(first, dict)
    for name, outcome in trained_alone.items():
        for other in others:
            assert isinstance(other, dict)
            assert other[name]["weights"] == other[name]["published"] == {}, "rank 0 alone gathers"
            assert other[name]["metrics"] == first[name]["metrics"]
            assert other[name]["scored"] == first[name]["scored"] == pytest.approx(outcome["scored"], abs=1e-3)
        torch.testing.assert_close(
            first[name]["metrics"],
            outcome["metrics"],
            rtol=1e-3,
            atol=1e-5,
            msg=lambda text, name=name: f"{name}: {text}",
        )
        torch.testing.assert_close(first[name]["weights"], outcome["weights"], rtol=0, atol=1e-4)
        torch.testing.assert_close(first[name]["published"], outcome["published"], rtol=2**-7, atol=1e-4)


def start(ranks: Ranks, folder: Path, model: Path) -> Outcome:
    """Two steps, a checkpoint, two more steps by rank 0's orders; what they lead to."""
    team = Team(ranks, settings(), Origin(str(model), None))
    if not ranks.is_main:
        member = CrewMember(team.policy, team.trainer, team.config, ranks)
        take_orders(ranks, member, vocab_size=VOCAB)
        return {}
    crew, store, norms = Crew(ranks), CheckpointStore(folder, ranks), []
    store.take_fence()
    for step in range(4):
        crew.train([each.group for each in received_groups(step, team.config, vocab=VOCAB)], version=step)
        norms.append(team.step(step)["optim/grad_norm"])
        if step == 1:
            store.save(STATE, team.policy)
    crew.publish()
    published = dict(team.policy.published())
    canary = FakeCanaryStore()
    identity = ModelIdentity.of(team.policy.model_files)
    LearnerCanary(canary, team.policy, [ROW], identity=identity, fence=1, crew=crew).publish(
        4, "xxh3_128:" + "0" * 32, keyframe_version=0
    )
    record = canary.canary()
    assert record is not None
    last = CheckpointStore(folder / "last", ranks)
    last.take_fence()
    weights = load_file(last.save(STATE, team.policy) / "model" / "model.safetensors")
    crew.finish()
    torch.testing.assert_close(published, {name: each.bfloat16() for name, each in weights.items()}, rtol=0, atol=0)
    return {"norms": norms[2:], "weights": weights, "scored": list(Canary.from_bytes(record).rows[0].logprobs)}


def resume(ranks: Ranks, folder: Path) -> Outcome:
    """Rank 0 finds and verifies the checkpoint and names it to the others; then the last two steps."""
    if ranks.is_main:
        origin = Origin("unused", CheckpointStore(folder).load_latest())
        origin.share(ranks)
    else:
        origin = Origin.receive(ranks)
    team = Team(ranks, settings(), origin)
    assert origin.checkpoint is not None
    assert origin.checkpoint.state == STATE
    assert team.policy.num_updates == 2
    return {"norms": [team.step(number)["optim/grad_norm"] for number in (2, 3)], "weights": team.weights()}


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, model: Path) -> tuple[Path, Outcome]:
    """The checkpoints of two ranks, and how they went on."""
    folder = tmp_path_factory.mktemp("checkpoints")
    outcome = run_ranks(tmp_path_factory.mktemp("results"), 2, start, folder, model)[0]
    assert isinstance(outcome, dict)
    return folder, outcome


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_any_number_of_ranks_goes_on_from_a_checkpoint_of_two(
    tmp_path: Path, started: tuple[Path, Outcome], world_size: int
) -> None:
    folder, expected = started
    found = resume(ALONE, folder) if world_size == 1 else run_ranks(tmp_path, world_size, resume, folder)[0]
    assert isinstance(found, dict)
    exact = world_size == 2
    torch.testing.assert_close(found["norms"], expected["norms"], rtol=0 if exact else 1e-3, atol=0)
    torch.testing.assert_close(found["weights"], expected["weights"], rtol=0, atol=0 if exact else 1e-4)


def test_the_model_of_two_ranks_is_a_plain_hugging_face_folder(started: tuple[Path, Outcome], model: Path) -> None:
    checkpoint = CheckpointStore(started[0]).load_latest()
    assert checkpoint is not None
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint.model_dir, dtype=torch.float32)
    alone = Team(ALONE, settings(), Origin(str(model), None))
    alone.step(0), alone.step(1)
    found = {name: parameter.detach() for name, parameter in loaded.named_parameters()}
    torch.testing.assert_close(found, alone.weights(), rtol=0, atol=1e-4, check_stride=False)


def test_the_canary_of_two_ranks_is_that_of_the_model_they_saved(started: tuple[Path, Outcome]) -> None:
    folder, outcome = started
    last = CheckpointStore(folder / "last").load_latest()
    assert last is not None
    alone = Team(ALONE, settings(), Origin("unused", last))
    assert outcome["scored"] == pytest.approx(score(alone.policy, ROW), abs=1e-5)


def test_every_rank_wrote_moments(started: tuple[Path, Outcome]) -> None:
    checkpoint = CheckpointStore(started[0]).load_latest()
    assert checkpoint is not None
    sizes = [path.stat().st_size for path in sorted((checkpoint.folder / "optimizer").iterdir())]
    assert len(sizes) == 2
    assert max(sizes) < 1.3 * min(sizes)


@pytest.mark.parametrize("option", ["optimizer_offload", "compile"])
def test_what_several_ranks_do_not_support_is_refused(model: Path, option: str) -> None:
    with pytest.raises(ConfigError, match=f"learner.{option} with 2 ranks is not supported"):
        load_trainees(settings(learner={option: True}), Origin(str(model), None), Ranks(world_size=2))
