"""Ways to take the same optimizer step: ours, and what it is measured against."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from benchmarks.peers.interface import Peer, Setting
from benchmarks.peers.naive import build_naive
from benchmarks.peers.ours import Ours
from benchmarks.peers.padded import build_padded
from benchmarks.peers.trl_grpo import TrlGrpo, TrlGrpoFromVllm

PEERS: Mapping[str, Callable[[Setting], Peer]] = MappingProxyType(
    {
        "ours": Ours,
        "trl": TrlGrpo,
        "trl_stock": TrlGrpo,
        "trl_vllm": TrlGrpoFromVllm,
        "padded": build_padded,
        "naive": build_naive,
    }
)
STOCK_ALLOCATOR = frozenset({"trl_stock"})
"""Peers whose process leaves freed memory to the C library; those of the others keep it on a CPU, as a run does."""
