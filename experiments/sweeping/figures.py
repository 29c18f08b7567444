"""The figures of a sweep: courses of the training, and pass@k, each as a mean over seeds with a 95 % band."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from omegaconf import OmegaConf

from experiments.comparing.curves import COLORS, Panel
from experiments.comparing.curves import draw as draw_pass
from experiments.drawing import dress, in_figure, save
from experiments.sweeping.collect import COURSES, by_seed, course, evaluation_course, measure_names
from experiments.sweeping.folder import SweepFolder
from upge.evaluation.intervals import Interval, t_interval
from upge.evaluation.passk import powers_of_two

#: A course is averaged over blocks of steps, so many over the whole run: single steps are noise.
BLOCKS = 20


def pass_curves(folder: SweepFolder, rows: Sequence[Mapping], target: Path) -> list[Path]:
    """passk.png and .svg: a panel for every benchmark that has several samples; nothing where there is none."""
    labels, panels = folder.sweep.labels, []
    columns = dict.fromkeys(column for row in rows for column in row)
    names = measure_names(list(columns))
    for place in [c.removesuffix("/pass@1") for c in columns if c.endswith("/pass@1") and c.count("/") == 2]:
        largest = max(int(c.rsplit("@", 1)[1]) for c in columns if c.startswith(f"{place}/pass@"))
        curves = {}
        for label in labels:
            found = {k: list(by_seed(rows, label, f"{place}/pass@{k}").values()) for k in powers_of_two(largest)}
            curves[label] = {k: _visible(t_interval(values), values) for k, values in found.items() if values}
        panels.append(Panel(names[f"{place}/avg"], {label: curve for label, curve in curves.items() if curve}))
    return draw_pass(panels, labels, target) if panels else []


def courses(folder: SweepFolder, target: Path) -> list[Path]:
    """dynamics.png and .svg: a panel for every metric of `COURSES`, and for the evaluations where there are several."""
    panels = [(title, unit, _of(folder, lambda path, m=metric: blocks(course(path, m)))) for metric, (title, unit) in
              COURSES.items()]  # fmt: skip
    for measure in ("greedy", *_sampled_measures(folder)):
        found = _of(folder, lambda path, m=measure: evaluation_course(path, m))
        if any(len(line) > 2 for line in found.values()):
            panels.append((f"Evaluation, {measure}", "share", found))
    panels = [panel for panel in panels if any(panel[2].values())]
    if not panels:
        return []
    columns = min(3, len(panels))
    size = (3.1 * columns + 0.4, 2.3 * math.ceil(len(panels) / columns) + 0.5)
    return save(target, "dynamics", size, lambda figure: _draw(figure, columns, panels, folder.sweep.labels))


def blocks(values: Mapping[int, float], count: int = BLOCKS) -> dict[int, float]:
    """Means over `count` blocks of steps as long as each other, under the middle step of each."""
    if len(values) <= count:
        return dict(values)
    last = max(values)
    length = math.ceil(last / count)
    found: dict[int, list[float]] = {}
    for step, value in values.items():
        found.setdefault((step - 1) // length, []).append(value)
    return {b * length + (length + 1) // 2: sum(all) / len(all) for b, all in sorted(found.items())}


def _of(folder: SweepFolder, read) -> dict[str, dict[int, Interval]]:
    """Label → step → interval over its seeds, at the steps that all of them have."""
    found: dict[str, dict[int, Interval]] = {}
    for label in folder.sweep.labels:
        lines = [read(folder.run(p)) for p in folder.sweep.runs if p.label == label and folder.is_trained(p)]
        steps = set.intersection(*map(set, lines)) if lines else set()
        found[label] = {step: _visible(t_interval([line[step] for line in lines]), lines) for step in sorted(steps)}
    return found


def _sampled_measures(folder: SweepFolder) -> list[str]:
    """mean@k and pass@k as the runs' evaluations call them."""
    for planned in folder.sweep.runs:
        file = folder.run(planned) / "config.yaml"
        if file.is_file():
            samples = OmegaConf.load(file).eval.samples
            return [f"mean@{samples}", f"pass@{samples}"]
    return []


def _draw(figure: Figure, columns: int, panels: Sequence, labels: Sequence[str]) -> None:
    grid, lines = figure.subplots(math.ceil(len(panels) / columns), columns, squeeze=False), {}
    for place, axes in enumerate(grid.flat):
        if place >= len(panels):
            axes.set_visible(False)
            continue
        title, unit, curves = panels[place]
        for label, curve in curves.items():
            if curve:
                lines[label] = _line(axes, curve, labels.index(label))
        axes.set_title(title)
        axes.set_ylabel(unit)
        axes.set_xlabel("step" if place + columns >= len(panels) else "")
        dress(axes)
        drawn = [one.value for curve in curves.values() for one in curve.values()]
        # By the lines: a band of three seeds can be many times as high as all that they show.
        bottom, top = min(0, 1.1 * min(drawn)), max(0, 1.12 * max(drawn))
        axes.set_ylim(bottom, top if top > bottom else 1)
    shown = [label for label in labels if label in lines]
    figure.legend([lines[label] for label in shown], [in_figure(label) for label in shown], loc="outside upper left",
                  ncols=min(4, len(shown)), frameon=False)  # fmt: skip


def _line(axes, curve: Mapping[int, Interval], index: int):
    color, dash = COLORS[index % len(COLORS)], "-" if index < len(COLORS) else "--"
    low, high = ([getattr(one, end) for one in curve.values()] for end in ("low", "high"))
    axes.fill_between(list(curve), low, high, color=color, alpha=0.14, linewidth=0)
    (line,) = axes.plot(list(curve), [one.value for one in curve.values()], color=color, linestyle=dash, linewidth=1.7)
    return line


def _visible(interval: Interval, runs: Sequence) -> Interval:
    """With the interval as its band; of one run there is none, and that of two covers the page."""
    value = interval.value
    return Interval(value, value, value) if len(runs) < 3 else interval
