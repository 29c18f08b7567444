"""A loss function of the user's own: `loss=FILE:FUNCTION`.

The function is called once per micro-batch and returns a scalar, whose gradients are summed over the micro-batches. Its
parameters are chosen by name from these:

    logprobs         [b, T] log π_θ of each response token, with gradient
    old_logprobs     [b, T] of the policy that sampled
    advantages       [b] of the algorithm that it is compared with
    mask             [b, T] bool, True on the tokens of the responses
    logits           [b, T, 2] of a vocabulary of two tokens; the sampled one is token 0
    rewards          [b]
    group            [b] number of the prompt; a micro-batch holds whole groups
    group_size       rollouts of each prompt
    micro_batches    of the update, per process
    ranks            processes; gradients are averaged over them
    num_items        response tokens of the whole update
    num_rollouts     rollouts of the whole update
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from experiments.referee.protocol import Micro, Update, each
from upge.errors import ConfigError, nearest

#: Name of an argument → its value.
ARGUMENTS: dict[str, Callable[[Micro], Any]] = {
    "logprobs": lambda m: m.logprobs,
    "old_logprobs": lambda m: m.old_logprobs,
    "advantages": lambda m: m.advantages,
    "mask": lambda m: m.mask,
    "logits": lambda m: m.logits,
    "rewards": lambda m: m.rewards,
    "group": lambda m: m.group,
    "group_size": lambda m: m.group_size,
    "micro_batches": lambda m: m.layout.micro_batches,
    "ranks": lambda m: m.layout.ranks,
    "num_items": lambda m: m.tokens,
    "num_rollouts": lambda m: m.rollouts,
}


def load(text: str) -> Callable[..., Tensor]:
    """The function FUNCTION of FILE, from 'FILE:FUNCTION'.

    Raises:
        ConfigError: there is no such file or function, the file cannot be imported, or the function has arguments that
            are not known.
    """
    path, colon, name = text.rpartition(":")
    if not colon or not path or not name:
        raise ConfigError(f"found {text!r}; give FILE:FUNCTION, for example my_loss.py:loss", "loss")
    if not Path(path).is_file():
        raise ConfigError(f"found {text!r}, but there is no file {path!r}; give the path of a Python file", "loss")
    spec = importlib.util.spec_from_file_location(f"upge_referee_{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"found {text!r}; give a Python file, whose name ends with .py", "loss")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file does
        raise ConfigError(f"{path} cannot be imported: {_where(error, path)}; fix it", "loss") from error
    function = getattr(module, name, None)
    if not callable(function):
        names = [n for n, value in vars(module).items() if callable(value)]
        raise ConfigError(f"found {text!r}, but {path} has no function {name!r}; {nearest(name, names)}", "loss")
    for argument, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise ConfigError(f"{name} takes {argument!r} by position only; remove the / after it", "loss")
        if argument not in ARGUMENTS and parameter.default is parameter.empty:
            hint = nearest(argument, ARGUMENTS)
            raise ConfigError(f"{name} has the argument {argument!r}, which the referee does not give; {hint}", "loss")
    return cast(Callable[..., Tensor], function)


def update(function: Callable[..., Tensor]) -> Update:
    """The forward and backward passes of a process with a function of the user's.

    Raises:
        ConfigError: in a pass, if the function fails or does not return a scalar with a gradient.
    """
    names = [name for name in inspect.signature(function).parameters if name in ARGUMENTS]

    def loss(micro: Micro) -> Tensor:
        try:
            value = function(**{name: ARGUMENTS[name](micro) for name in names})
        except Exception as error:  # whatever the function does
            place = inspect.getsourcefile(function) or ""
            raise ConfigError(f"the function failed: {_where(error, place)}; fix it", "loss") from error
        if not isinstance(value, torch.Tensor) or value.dim() or not value.requires_grad:
            what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)[:80]
            raise ConfigError(
                f"the function returned {what}; return a scalar tensor that depends on `logprobs`", "loss"
            )
        return value

    return each(loss)


def _where(error: Exception, path: str) -> str:
    """The error, with the last line of the file `path` that it passed."""
    lines = [one.lineno for one in traceback.extract_tb(error.__traceback__) if one.filename == path]
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return f"{reason} (line {lines[-1]})" if lines else reason
