"""Finds verifiers by name."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import cast

from upge.errors import ConfigError, nearest

BUILT_IN = {
    "math": "upge.verify.math.MathVerifier",
    "math_last": "upge.verify.math.LAST_ANSWER",
    "number": "upge.verify.number.NumberVerifier",
    "choice": "upge.verify.choice.ChoiceVerifier",
    "regex": "upge.verify.regex.RegexVerifier",
    "reasoning_gym": "upge.verify.gym.ReasoningGymVerifier",
}

Verifier = Callable[[str, str, str | None], float]
"""(response, ground truth, prompt) → reward in [0, 1]."""


def load(name: str) -> Verifier:
    """The verifier called `name`: a key of `BUILT_IN`, or the dotted path of a callable in any importable module.

    The callable takes (response, answer, prompt) and returns a number in [0, 1]. A class is instantiated without
    arguments, and its instance is the verifier.

    Raises:
        ConfigError: there is nothing of that name, or it is not such a callable.
    """
    verifier = find(name)
    if inspect.isclass(verifier):
        try:
            verifier = verifier()
        except Exception as error:
            raise _refusal(name, f"its class cannot be made without arguments ({error!r})") from error
    if not callable(verifier):
        raise _refusal(name, f"it is a {type(verifier).__name__}, not a callable (response, answer, prompt) -> reward")
    try:
        inspect.signature(verifier).bind("response", "answer", "prompt")
    except TypeError as error:
        raise _refusal(name, f"it must accept (response, answer, prompt), but {error}") from error
    except ValueError:  # a callable written in C may have no signature
        pass
    return cast(Verifier, verifier)


def find(name: str) -> object:
    """The object that `name` stands for, imported but neither checked nor instantiated.

    Raises:
        ConfigError: as for `load`.
    """
    path = BUILT_IN.get(name, name)
    module_name, _, attribute = path.rpartition(".")
    if not module_name or not all(part.isidentifier() for part in path.split(".")):
        raise _refusal(name, f"there is no such verifier; {nearest(name, BUILT_IN)}")
    if module_name == "__main__":
        raise _refusal(name, "worker processes cannot import it from the main script; move it into a module")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise _refusal(name, f"there is no module '{error.name}' on the import path") from error
        raise _refusal(name, f"importing '{module_name}' failed: {error}") from error
    except Exception as error:
        raise _refusal(name, f"importing '{module_name}' failed: {error!r}") from error
    if not hasattr(module, attribute):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise _refusal(name, f"module '{module_name}' has no '{attribute}'; {nearest(attribute, known)}")
    return getattr(module, attribute)


def _refusal(name: str, what: str) -> ConfigError:
    return ConfigError(
        f"verify.verifier: found '{name}': {what}. Give one of {', '.join(sorted(BUILT_IN))}, "
        "or a dotted path such as my_package.my_module.my_verifier."
    )
