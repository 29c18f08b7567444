"""The model card of a run: formula, data, results and command, from the files of its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from algorithms import stem
from experiments.grid import accuracy_rows, markdown_table, measures, number
from experiments.report.folder import RunFolder

#: Settings in the card's table, besides those that the command shows.
_SETTINGS = (
    *("steps", "prompts_per_step", "group_size", "optimizer.lr", "optimizer.schedule", "rollout.temperature"),
    *("rollout.max_response_tokens", "model.dtype", "model.lora.rank", "seed"),
)
#: Metrics of the last step.
_METRICS = ("reward/mean", "pass_rate", "loss", "entropy", "response_length", "grad_norm")


def card(run: RunFolder, name: str) -> str:
    """The text of README.md for the model of a run; `name` is its title."""
    names = run.run.get("names") if isinstance(run.run.get("names"), Mapping) else {}
    config, parts = OmegaConf.create(run.config), _parts(names)
    algorithm = "+".join(parts)
    description = OmegaConf.select(config, "algo.description") or ""
    base = _base(config)
    sections = [
        _front_matter(config, parts),
        f"# {name}",
        f"{base or names.get('model')}, trained with `{algorithm}` ({description}) on `{names.get('data')}` by upge.",
        "## Gradient",
        f"```\n{run.run.get('formula_text') or ''}\n```",
        "## Data",
        f"```yaml\n{OmegaConf.to_yaml(OmegaConf.create({'data': run.config.get('data') or {}})).strip()}\n```",
        "## Settings",
        markdown_table(["key", "value"], [(f"`{key}`", f"{OmegaConf.select(config, key)}") for key in _SETTINGS]),
        *_results(run),
        "## Command",
        f"```\n{run.run.get('command') or ''}\n```",
        "## Versions",
        _versions(run.run),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _parts(names: Mapping[str, Any]) -> list[str]:
    """The names of the run's algorithm and corrections; a file's is its name without folder and suffix."""
    chosen = [str(names.get("algo") or ""), *str(names.get("correction") or "").split(",")]
    return [stem(one) for one in chosen if one]


def _front_matter(config: Any, parts: Sequence[str]) -> str:
    """The metadata that the hub reads."""
    data: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["upge", *parts]}
    if base := _base(config):
        data["base_model"] = base
    hub = OmegaConf.select(config, "data.hub")
    if isinstance(hub, str) and hub.count("/") == 1:
        data["datasets"] = [hub]
    return f"---\n{OmegaConf.to_yaml(OmegaConf.create(data))}---"


def _base(config: Any) -> str:
    """The model that the run began with, if it is one of the hub."""
    path = str(OmegaConf.select(config, "model.path") or "")
    is_hub = path.count("/") == 1 and not path.startswith((".", "~", "/")) and not Path(path).exists()
    return path if is_hub and not path.lower().endswith(".gguf") else ""


def _results(run: RunFolder) -> list[str]:
    """The evaluations before and after training, and the metrics of the last step."""
    parts = []
    if len(run.evaluations) > 1:
        first, last = run.evaluations[0], run.evaluations[-1]
        steps = f"step {first['step']} → {last['step']}"
        head = ["level", "problems", *(f"{one}, {steps}" for one in measures(first, last))]
        rows = [
            [one.level, one.problems, *(" → ".join(change.percents()[:2]) for change in one.changes)]
            for one in accuracy_rows(first, last)
        ]
        parts += ["## Accuracy in %", "Measured during training, on the run's own evaluation problems."]
        parts.append(markdown_table(head, rows))
    if run.metrics:
        last = run.metrics[-1]
        rows = [(f"`{name}`", f"{value:.4g}") for name in _METRICS if (value := number(last.get(name))) is not None]
        parts += [f"## Metrics of step {last['step']}", markdown_table(["metric", "value"], rows)]
    return parts


def _versions(run: Mapping[str, Any]) -> str:
    versions = run.get("versions") if isinstance(run.get("versions"), Mapping) else {}
    rows = [(name, str(value)) for name, value in versions.items()]
    rows += [(name.replace("_", " "), str(run[name])) for name in ("git_commit", "machine", "engine") if run.get(name)]
    return markdown_table(["what", "version"], rows)
