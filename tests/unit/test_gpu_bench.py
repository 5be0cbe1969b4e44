"""What benchmarks/gpu*.py compute without a GPU: sizes, operations, utilisation, sections, the picture."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import Section, run_section, sections
from benchmarks.gpu_kernels import MIXED, layouts
from benchmarks.gpu_plot import attention_tflops, plot, step_mfu
from benchmarks.gpu_results import Results, peak_bytes, spread, timed
from benchmarks.gpu_step import PACK, batches
from benchmarks.machine import ROOT
from benchmarks.model_shapes import SHAPES
from learner.flops import peak_flops, utilisation
from tests.tiny_models import micro_batch

CPU = torch.device("cpu")


@pytest.mark.parametrize(("name", "body", "head"), [("0.6b", 440_401_920, 1024), ("1.7b", 1_409_286_144, 2048)])
def test_shapes_are_qwen3s(name: str, body: int, head: int) -> None:
    """By hand: per layer 2 E (16 + 8) 128 of attention and 3 E I of the MLP."""
    shape, flops = SHAPES[name], SHAPES[name].flops()
    per_layer = 2 * shape.hidden_size * (16 + 8) * 128 + 3 * shape.hidden_size * shape.intermediate_size
    assert flops.body == flops.trained_body == 28 * per_layer == body
    assert flops.head == flops.trained_head == 151_936 * head
    assert flops.attention == 28 * 16 * 128


def test_the_operations_of_a_step_are_six_per_element_and_token_and_half_the_square() -> None:
    flops, batch = SHAPES["0.6b"].flops(), micro_batch((5, 3))
    squares = 5 * 5 + 3 * 3
    expected = 6 * flops.body * 8 + 6 * flops.head * batch.num_loss_tokens + 6 * flops.attention * squares
    assert flops.training(batch) == expected


def test_utilisation_is_the_share_of_the_cards_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("a card of tomorrow") is None
    assert utilisation(1e15, 2.0, CPU) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert utilisation(989e12, 2.0, torch.device("cuda")) == pytest.approx(0.5)


def test_layouts_hold_the_same_tokens_in_three_ways() -> None:
    one, documents, shared = layouts(1).values()
    assert one.num_tokens == documents.num_tokens == shared.num_tokens == sum(MIXED) == PACK
    assert one.squares == PACK**2
    assert documents.squares == sum(each**2 for each in MIXED)
    assert shared.squares == 512**2 + 8 * ((512 + 960) ** 2 - 512**2)


def test_whole_documents_fill_their_packs() -> None:
    lengths = batches(1024, 8 * 1024, 1)
    assert [group.num_tokens for group in lengths["whole"]] == [2 * 1024] * 4
    assert sum(group.num_tokens for group in lengths["reasoning"]) >= 8 * 1024


def test_results_are_whole_after_every_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_OUT", str(tmp_path / "part.json"))
    results = Results()
    for number, name in enumerate("ab", start=1):
        results.add(name, number)
        assert len(json.loads((tmp_path / "part.json").read_text())) == number
    assert [path.name for path in tmp_path.iterdir()] == ["part.json"]


def test_timing_leaves_the_warm_up_out() -> None:
    calls: list[int] = []
    assert len(timed(lambda: calls.append(1), CPU, warm_up=2, repeats=3)) == 3
    assert peak_bytes(lambda: calls.append(1), CPU) == 0
    assert len(calls) == 6
    assert spread([3.0, 1.0, 2.00004]) == {"min": 1.0, "median": 2.0, "max": 3.0}


def test_a_section_tells_how_it_ended_and_what_it_had_by_then(tmp_path: Path) -> None:
    say = (
        "import json, os, pathlib; pathlib.Path(os.environ['BENCH_OUT']).write_text(json.dumps({'a': 1})); print('x');"
    )
    done = run_section(Section("done", (sys.executable, "-c", say), 60), tmp_path, 60)
    assert (done["exit"], done["last_line"], done["a"]) == ("0", ["x"], 1)
    endless = Section("endless", (sys.executable, "-c", "import threading; threading.Event().wait()"), 0.2)
    assert run_section(endless, tmp_path, 0.2)["exit"] == "cut off after 0 s"


def test_flash_attention_4_has_sections_where_its_folder_is_named() -> None:
    plain, more = ([section.name for section in sections(folder)] for folder in (None, "/flash4"))
    assert set(more) - set(plain) == {"flash4_1.7b", "flash4_0.6b", "flash4_tests", "flash4_kernels"}
    assert all(each.environment["PYTHONPATH"].startswith("/flash4") for each in sections("/flash4")[1:5])


def test_the_picture_has_the_last_run_of_each_measurement(tmp_path: Path) -> None:
    old, new = ({"min": 0.1, "median": value, "max": 0.3} for value in (0.1, 0.2))
    runs = [{"sections": {"step_1.7b": {"exit": "0", "whole / compiled": {"mfu": each}}}} for each in (old, new)]
    assert step_mfu({"runs": runs}) == {"1.7b / whole / compiled": new}
    fresh = {"machine": {"gpu": "card"}, "kernels": {"attention / documents / lambdapo_varlen": {"tflops": old}}}
    assert step_mfu(fresh) == {}
    assert attention_tflops(fresh) == {"documents": {"varlen": old}}
    plot(fresh, tmp_path / "gpu.svg")
    assert (tmp_path / "gpu.svg").read_text().startswith("<?xml")


def test_the_record_can_be_drawn_and_alike_each_time(tmp_path: Path) -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "gpu.json").read_text())
    assert len(step_mfu(result)) >= 8
    assert {"flash4", "varlen", "sdpa"} <= set(attention_tflops(result)["documents"])
    for name in ("one.svg", "two.svg"):
        plot(result, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
