"""The environment variables that vLLM and OpenMP read once, when they are imported."""

import os
from importlib import metadata

_EVERYWHERE = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",  # an actor's model files come from its run
    "TOKENIZERS_PARALLELISM": "false",  # no threads before vLLM forks
}
_ON_CPU = {
    "OMP_NUM_THREADS": "1",  # with more, OpenMP threads of an in-process worker fight each other: 12 times slower
    "TORCHDYNAMO_DISABLE": "1",  # else the first log-probabilities wait 3-8 s for a compiler
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else every actor of a machine binds to the same first core
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # lets the worker live in the engine's process, not in a third one
}


def is_cpu_build() -> bool:
    """Whether the installed vLLM is its CPU build (extra ``cpu``), packaged as ``vllm-cpu``."""
    try:
        return "cpu" in metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return True


def prepare_environment() -> None:
    """Set what is not set; to be called before torch, transformers or vllm is imported."""
    for name, value in (_EVERYWHERE | (_ON_CPU if is_cpu_build() else {})).items():
        os.environ.setdefault(name, value)
