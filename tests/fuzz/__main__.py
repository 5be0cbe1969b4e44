"""`scripts/fuzz`: every reader of foreign bytes for as long as wanted; coverage-guided where atheris is there.

A find ends it: the bytes lie in ``outputs/fuzz`` then, and the exception is shown.
"""

import hashlib
import importlib.util
import logging
import random
import time
from pathlib import Path
from typing import Annotated

import typer

_FINDS = Path("outputs") / "fuzz"


def main(
    minutes: Annotated[float, typer.Option(help="How long.")] = 10.0,
    seed: Annotated[int, typer.Option(help="Of the mutations.")] = 0,
) -> None:
    """Feed tampered bytes to every reader."""
    logging.disable()  # each refusal is worth a line in production, and none here
    if importlib.util.find_spec("atheris") is None:
        _mutate(minutes, seed)
    else:
        _follow_coverage(minutes, seed)


def _mutate(minutes: float, seed: int) -> None:
    from tests.fuzz.mutation import mutated
    from tests.fuzz.targets import targets

    source, every = random.Random(seed), targets()
    deadline, count = time.monotonic() + 60 * minutes, 0
    while time.monotonic() < deadline:
        for target in every:
            content = mutated(source.choice(target.seeds), source)
            _feed(target.name, target, content)
            count += 1
    print(f"{count} inputs in {minutes:g} minutes, {count // len(every)} of each of {len(every)} readers, no crash")


def _feed(name: str, target: object, content: bytes) -> None:
    try:
        target(content)  # type: ignore[operator]
    except BaseException:
        _FINDS.mkdir(parents=True, exist_ok=True)
        path = _FINDS / f"{name}-{hashlib.sha256(content).hexdigest()[:12]}"
        path.write_bytes(content)
        print(f"a find: {path}")
        raise


def _follow_coverage(minutes: float, seed: int) -> None:
    import atheris

    with atheris.instrument_imports(include=["lambdapo_async", "msgpack"]):
        from tests.fuzz.targets import targets
    every = targets()
    corpus = _FINDS / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, target in enumerate(every):
        for content in target.seeds:
            (corpus / f"{target.name}-{hashlib.sha256(content).hexdigest()[:12]}").write_bytes(
                bytes([number]) + content
            )

    def feed(content: bytes) -> None:
        if content:
            target = every[content[0] % len(every)]
            _feed(target.name, target, content[1:])

    options = [f"-max_total_time={int(60 * minutes)}", f"-seed={seed + 1}", "-max_len=8192", "-rss_limit_mb=4096"]
    atheris.Setup(["fuzz", *options, str(corpus)], feed)
    atheris.Fuzz()


if __name__ == "__main__":
    typer.run(main)
