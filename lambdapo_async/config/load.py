"""TOML file plus dotted overrides -> :class:`RunConfig`, or one line that says what to change."""

import difflib
import json
import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from lambdapo_async.config.run import CONFIG_SCHEMA, RunConfig
from lambdapo_async.errors import ConfigError, RunNotFoundError

REDIS_URL_VARIABLE = "REDIS_URL"
HMAC_KEY_VARIABLE = "LAMBDAPO_HMAC_KEY"


def load_config(path: Path, overrides: Iterable[str] = (), *, environ: Mapping[str, str] = os.environ) -> RunConfig:
    """Read ``path``, apply ``section.key=value`` overrides and validate.

    Precedence: overrides, then REDIS_URL for ``broker.url`` and LAMBDAPO_HMAC_KEY for ``broker.hmac_key``, then the
    file, then the defaults.

    Raises:
        ConfigError: one line that names the field, the value and the nearest valid name.
    """
    tree = _read_toml(path)
    for name, variable in (("url", REDIS_URL_VARIABLE), ("hmac_key", HMAC_KEY_VARIABLE)):
        if value := environ.get(variable):
            _set(tree, ["broker", name], value)
    return parse_config(apply_overrides(tree, overrides), source=str(path))


def apply_overrides(tree: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Set ``section.key=value`` in ``tree``, in place; later ones win."""
    for override in overrides:
        _apply_override(tree, override)
    return tree


def parse_config(tree: Mapping[str, Any], *, source: str) -> RunConfig:
    """Validate a tree of plain values; ``source`` leads the error's line."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        problems = [_describe(detail) for detail in error.errors(include_url=False)]
        raise ConfigError(f"{source}: " + "; ".join(problems)) from None


def parse_published(config_json: bytes, overrides: Iterable[str] = (), *, run_id: str) -> RunConfig:
    """Inverse of :meth:`RunConfig.published`, with ``overrides`` on top.

    Raises:
        RunNotFoundError: no config that this version understands.
        ConfigError: a wrong override.
    """
    try:
        tree = json.loads(config_json)
    except (ValueError, RecursionError) as error:
        raise RunNotFoundError(f"the config of run {run_id} is damaged: {error}") from error
    found = tree.pop("config_schema", None) if isinstance(tree, dict) else None
    if found != CONFIG_SCHEMA:
        raise RunNotFoundError(
            f"the config of run {run_id} has schema {found}, this version reads {CONFIG_SCHEMA}: "
            "install the learner's version of lambdapo-async"
        )
    return parse_config(apply_overrides(tree, overrides), source=f"run {run_id}")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file; the shipped ones are in configs/") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; name a .toml file in it") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    path = [part.strip() for part in key.split(".")]
    if not equals or not all(path) or "://" in key:
        shown = "***" if "://" in override else override  # a URL may hold a password
        raise ConfigError(f"--set {shown}: expected section.key=value, for example learner.lr=1e-6")
    _set(tree, path, _parse_value(text.strip()))


def _parse_value(text: str) -> Any:
    """A TOML value, or the text itself where it is none (so strings need no quotes)."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _set(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for depth, part in enumerate(path[:-1], start=1):
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"--set {'.'.join(path)}: {'.'.join(path[:depth])} is a value, not a section")
    tree[path[-1]] = value


def _describe(detail: ErrorDetails) -> str:
    location = [str(part) for part in detail["loc"]]
    field = ".".join(_without_union_tags(location)) or "config"
    if detail["type"] == "extra_forbidden":
        return f"unknown key {field}{_suggestion(location)}"
    if detail["type"] == "missing":
        return f"{field} is required"
    if detail["type"] == "model_type":
        return f"{field} is a section: set its keys ({', '.join(_valid_names(location))}) one by one"
    if detail["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return f"{field}.kind must be one of {', '.join(_TASKS)}"
    if detail["type"] == "tuple_type":
        return f"{field} is a list: write it as {field} = [..., ...]"
    message = detail["msg"].removeprefix("Value error, ")
    if not location:
        return message
    if detail["type"] == "value_error" and isinstance(detail["input"], Mapping):  # of a section's keys together
        return f"{field}: {message}"
    return f"{field} = {_shown(field, detail['input'])}: {message[0].lower()}{message[1:]}"


def _shown(field: str, value: Any) -> str:
    """The wrong value, unless it may hold a password: of the broker only numbers are shown, and no key."""
    is_number = isinstance(value, int | float) and field != "broker.hmac_key"
    is_secret = field.split(".")[0] == "broker" and not is_number
    return "***" if is_secret else repr(value)[:120]


def _without_union_tags(location: Sequence[str]) -> list[str]:
    """pydantic puts the chosen kind of a tagged union into the location: ``task.jsonl.train_path``."""
    return [part for i, part in enumerate(location) if not (i == 1 and location[0] == "task" and part in _TASKS)]


def _suggestion(location: Sequence[str]) -> str:
    names = _valid_names(location[:-1])
    if elsewhere := [path for path in _all_paths(RunConfig) if path.rpartition(".")[2] == location[-1]]:
        return f"; did you mean {' or '.join(elsewhere)}?"
    nearest = difflib.get_close_matches(location[-1], names, n=1, cutoff=0.5)
    if nearest:
        return f"; did you mean {nearest[0]}?"
    return f"; valid here: {', '.join(sorted(names))}"


def _valid_names(location: Sequence[str]) -> list[str]:
    section: type[BaseModel] = RunConfig
    for part in location:
        if part in _TASKS:
            section = _TASKS[part]
        elif part in section.model_fields:
            section = _section_of(section.model_fields[part].annotation) or section
    return list(section.model_fields)


def _all_paths(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted path of every key below ``section``, a key of several tasks once."""
    names = {name: field.annotation for name, field in section.model_fields.items()}
    for name, annotation in names.items():
        inner = _section_of(annotation)
        if inner is None:
            yield prefix + name
        elif name == "task":
            yield from dict.fromkeys(path for task in _TASKS.values() for path in _all_paths(task, f"{prefix}{name}."))
        else:
            yield from _all_paths(inner, f"{prefix}{name}.")


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class inside an annotation such as ``Surrogate | None`` or ``tuple[Rejection, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    sections = (_section_of(argument) for argument in get_args(annotation))
    return next((section for section in sections if section is not None), None)


def _task_kinds() -> dict[str, type[BaseModel]]:
    union = RunConfig.model_fields["task"].annotation
    members = get_args(union) if get_origin(union) is Union or get_args(union) else (union,)
    return {get_args(member.model_fields["kind"].annotation)[0]: member for member in members}


_TASKS = _task_kinds()
