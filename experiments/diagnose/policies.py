"""The policies to measure and their weights: a model's folder, or the checkpoints that a run has kept."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from experiments.config import compose, presets
from experiments.diagnose.settings import Chosen
from upge.errors import ConfigError, ModelError
from upge.models import local_path
from upge.models.loading import check_loaded, read_config
from upge.train.config import ModelConfig
from upge.train.folder import RunFolder


@dataclass(frozen=True)
class Policy:
    """A model to measure.

    Attributes:
        label: its name in tables and figures.
        model: its settings, with a folder as path.
        step: its training step if it comes from a run, else None.
    """

    label: str
    model: ModelConfig
    step: int | None = None


@contextlib.contextmanager
def policies(chosen: Chosen) -> Iterator[list[Policy]]:
    """A context manager with the policies of a command line; their unpacked files exist within it.

    Raises:
        ConfigError: two policies have the same name.
        ModelError: a policy cannot be read.
    """
    with TemporaryDirectory(prefix="diagnose") as folder:
        made = list(_policies(chosen, Path(folder)))
        # Compare the names of their folders, which must differ.
        names = [folder_name(one.label).lower() for one in made]
        twice = next((one.label for one, name in zip(made, names, strict=True) if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(
                f"policies: several would be called '{twice}'; name them, as in policies=[LABEL:PATH,...]"
            )
        yield made


def folder_name(label: str) -> str:
    """The name of a policy's folder within a diagnosis."""
    return re.sub(r"[^\w.-]+", "_", label)


def model_of(name: str, base: ModelConfig) -> ModelConfig:
    """The settings of a model given as a preset, a folder or a file, with the prompt settings of `base`."""
    path = name
    if name in presets("model"):
        path = compose([f"model={name}"]).config.model.path
    elif not Path(name).expanduser().exists() and name.count("/") != 1:
        raise ConfigError(f"'{name}' is neither a model's folder nor one of {', '.join(presets('model'))}; give one")
    return replace(base, path=local_path(str(Path(path).expanduser()) if Path(path).expanduser().exists() else path))


def load_model(model: ModelConfig) -> torch.nn.Module:
    """Loads the causal LM in its dtype, on a GPU if there is one.

    Raises:
        ModelError: it cannot be loaded or is incomplete.
    """
    from transformers import AutoModelForCausalLM

    try:
        network, loading_info = AutoModelForCausalLM.from_pretrained(
            model.path,
            config=read_config(model.path, model.overrides),
            dtype=getattr(torch, model.dtype),
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"model.path: '{model.path}' cannot be loaded: {str(error).splitlines()[0]}") from error
    check_loaded(model.path, loading_info)
    return network.to("cuda" if torch.cuda.is_available() else "cpu")


def _policies(chosen: Chosen, scratch: Path) -> Iterator[Policy]:
    base = replace(chosen.run.model, path=local_path(chosen.run.model.path))
    if chosen.config.policies:
        for entry in chosen.config.policies:
            label, colon, name = entry.rpartition(":")
            # A GGUF file of a package has a colon of its own.
            if not colon or name.lower().endswith(".gguf"):
                label, name = Path(entry).name, entry
            yield Policy(label, model_of(name, base))
    elif chosen.config.run:
        yield from _of_run(RunFolder(Path(chosen.config.run).expanduser()), base, scratch)
    else:
        yield Policy(chosen.names["model"], base)


def _of_run(folder: RunFolder, base: ModelConfig, scratch: Path) -> Iterator[Policy]:
    """The run's initial model, each kept checkpoint, and the final model unless a checkpoint has its step."""
    yield Policy("0", base, 0)
    steps = folder.checkpoint_steps()
    for step in steps:
        path = scratch / folder.tag(step)
        unpack(folder.checkpoints, folder.tag(step), base, path)
        yield Policy(str(step), replace(base, path=str(path), overrides={}), step)
    last = folder.facts.get("finished_step")
    if last is not None and last not in steps:
        yield Policy(str(last), replace(base, path=str(folder.final), overrides={}), int(last))
    best = folder.best_facts
    if best and best["step"] not in {0, last, *steps}:
        yield Policy(str(best["step"]), replace(base, path=str(folder.best), overrides={}), int(best["step"]))


def unpack(checkpoints: Path, tag: str, model: ModelConfig, folder: Path) -> None:
    """Writes the weights of a training checkpoint in Hugging Face format.

    Args:
        checkpoints: the run's folder of checkpoints.
        tag: the checkpoint's name.
        model: the model that the run started from.
        folder: where the weights are written.

    Raises:
        ModelError: the checkpoint cannot be read, or belongs to another model.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    network = load_model(model).cpu()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            state = get_fp32_state_dict_from_zero_checkpoint(str(checkpoints), tag=tag)
        # In training the model is the part `model` of a policy.
        weights = {name.removeprefix("model."): values for name, values in state.items()}
        network.load_state_dict(weights)
    except (OSError, ValueError, KeyError, RuntimeError, AssertionError) as error:
        reason = str(error).splitlines() or [type(error).__name__]
        raise ModelError(f"{checkpoints / tag}: the checkpoint cannot be read: {reason[0]}") from error
    network.save_pretrained(folder)


def ordered(given: Sequence[Policy]) -> list[Policy]:
    """The policies by step if all have one, else in the given order."""
    return sorted(given, key=lambda one: one.step) if all(one.step is not None for one in given) else list(given)
