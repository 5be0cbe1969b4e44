"""Objects of the user's own code, named in the config by a dotted path; only the learner imports them."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from lambdapo_async.errors import ConfigError


def load_attribute(path: str, *, field: str) -> object:
    """What ``package.module:NAME`` (or ``package.module.NAME``) names.

    Raises:
        ConfigError: one line that names ``field``, the path and what is missing.
    """
    module_name, _, name = path.replace(":", ".").rpartition(".")
    try:
        attributes = vars(importlib.import_module(module_name))
    except ImportError as error:
        raise ConfigError(
            f"{field} = {path!r}: module {module_name} cannot be imported ({error}); its folder must be on PYTHONPATH"
        ) from error
    except Exception as error:  # the user's code may raise anything; none of it is swallowed
        raise ConfigError(
            f"{field} = {path!r}: importing {module_name} raised {type(error).__name__}: {error}"
        ) from error
    if name not in attributes:
        raise ConfigError(f"{field} = {path!r}: module {module_name} has no {name}")
    return attributes[name]


def load_function(path: str, *, field: str, parameters: tuple[str, ...]) -> Callable[..., Any]:
    """The function that ``path`` names; ``ConfigError`` unless it can be called with ``parameters`` by position."""
    function = load_attribute(path, field=field)
    wanted = f"a function of ({', '.join(parameters)})"
    if not callable(function):
        raise ConfigError(f"{field} = {path!r} is a {type(function).__name__}, expected {wanted}")
    try:
        inspect.signature(function).bind(*parameters)
    except TypeError as error:
        raise ConfigError(f"{field} = {path!r} is not {wanted}: {error}") from None
    return function
