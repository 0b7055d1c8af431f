"""A picture of what each job did when; where there is nothing, it waited for the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from services.coordinator.simulation.trace import Phase, Trace

COLOURS: Mapping[Phase, str] = {
    "sample": "#3b76af",
    "reward": "#e8c24a",
    "queue": "#d5d5d5",
    "train": "#c4493d",
}


def draw(traces: Mapping[str, Trace], path: Path) -> None:
    """A PNG with a row for each job, and one for the samplers and the trainers together.

    Raises:
        ImportError: matplotlib is not there; it comes with the extra `benchmarks`.
    """
    # Only pictures need it, and it is slow to import.
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415
    from matplotlib.patches import Rectangle  # noqa: PLC0415

    end = max(trace.end for trace in traces.values())
    figure, all_axes = plt.subplots(
        len(traces),
        1,
        figsize=(10, 0.3 * sum(_rows(one) for one in traces.values()) + 1.5),
        sharex=True,
        squeeze=False,
        gridspec_kw={"height_ratios": [_rows(t) for t in traces.values()]},
    )
    for (name, trace), axes in zip(traces.items(), all_axes[:, 0], strict=True):
        _draw(axes, trace)
        axes.set_title(name.replace("_", " "), loc="left", fontsize=9)
        axes.set_xlim(0, end)
    all_axes[-1, 0].set_xlabel("simulated seconds", fontsize=8)
    handles = [Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    names = ["samples", "waits for rewards", "waits for the trainer", "trains"]
    figure.legend(handles, names, ncols=4, loc="upper right", fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _rows(trace: Trace) -> int:
    return len(trace.phases) + len(trace.samplers) + len(trace.trainers)


def _draw(axes: Any, trace: Trace) -> None:
    labels: list[str] = []
    for name, phases in trace.phases.items():
        for phase, colour in COLOURS.items():
            bars = [(begin, end - begin) for one, begin, end in phases if one == phase]
            axes.broken_barh(bars, (len(labels) - 0.4, 0.8), color=colour, linewidth=0)
        labels.append(name)
    for name, history in trace.samplers.items():
        ends = [*(time for time, _ in history[1:]), trace.end]
        bars = [
            (begin, end - begin) for (begin, count), end in zip(history, ends, strict=True) if count
        ]
        axes.broken_barh(bars, (len(labels) - 0.3, 0.6), color=COLOURS["sample"], linewidth=0)
        labels.append(f"sampler {name}")
    for number, passes in enumerate(trace.trainers):
        bars = [(begin, end - begin) for begin, end in passes]
        axes.broken_barh(bars, (len(labels) - 0.3, 0.6), color=COLOURS["train"], linewidth=0)
        labels.append(f"trainer t{number}")
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.tick_params(axis="x", labelsize=7)
    axes.invert_yaxis()
