"""The plots of a report, each in a light and a dark version."""

import base64
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import optuna
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.tri import Triangulation
from numpy.typing import NDArray
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from PIL import Image

from hpsearch.storage.tables import by_value

BLUE, ORANGE, GREY = "#3f83c9", "#e0802b", "#98a2ae"
COLORS = {TrialState.COMPLETE: BLUE, TrialState.PRUNED: "#9a7bd0"}  # orange marks the best trial
THEMES = {"light": ("#39434f", "#dfe4ea"), "dark": ("#c3cbd5", "#39424e")}  # text, lines
AGES = LinearSegmentedColormap.from_list("age", [GREY, BLUE])
SETTINGS: Any = {
    "text.parse_math": False,  # otherwise a name with dollar signs is parsed as a formula
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "grid.linewidth": 0.7,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
}
MAX_JITTERED = 10  # jitter the points of integers and choices up to this span
MAX_CURVES = 120
N_BEST_CURVES = 20
N_LEVELS = 12  # of the contour plot


@dataclass(frozen=True)
class Picture:
    """A plot as base64 PNG files, with its alternative text."""

    alt: str
    light: str
    dark: str
    note: str = ""


@contextmanager
def _new_axes(width: float = 5.4, height: float = 3.4) -> Iterator[Axes]:
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(width, height), dpi=170, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure.subplots()


def rank_hyperparameters(trials: Sequence[FrozenTrial], names: Sequence[str]) -> dict[str, float]:
    """Return the importance of each hyperparameter by PED-ANOVA, largest first. They sum to one.

    PED-ANOVA asks what the best tenth of the trials have in common. So pruned trials count too, with their last report,
    though Optuna leaves them out.
    """
    study = optuna.create_study(direction="maximize")
    study.add_trials(
        create_trial(params=trial.params, distributions=trial.distributions, value=trial.value) for trial in trials
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return optuna.importance.get_param_importances(study, params=list(names))


def draw_history(complete: Sequence[FrozenTrial], metric: str = "accuracy") -> Picture:
    """Plot the value of each completed trial, and the best so far."""
    numbers, values = [trial.number for trial in complete], _values_of(complete)
    with _new_axes() as axes:
        axes.scatter(numbers, values, _size(len(values)), BLUE, alpha=0.55, linewidth=0, label="completed trial")
        best = np.maximum.accumulate(values)
        axes.step(numbers, best, ORANGE, where="post", linewidth=2, label="best so far")
        axes.legend(loc="lower right")
        axes.set(xlabel="trial", ylabel=f"validation {metric}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        note = _focus(axes, values)
        return _picture(axes, f"Validation {metric} of {len(values)} completed trials in order.", note)


def draw_importances(importances: Mapping[str, float]) -> Picture:
    """Plot the importance of each hyperparameter, largest first, as a bar chart."""
    with _new_axes() as axes:
        bars = axes.barh([*importances], [*importances.values()], color=BLUE)
        axes.bar_label(bars, fmt="{:.2f}", padding=3, fontsize=9)
        axes.invert_yaxis()
        axes.margins(x=0.1)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("importance")
        return _picture(axes, "Importance of each hyperparameter as a bar chart.")


def draw_slice(name: str, complete: Sequence[FrozenTrial], best: FrozenTrial, metric: str = "accuracy") -> Picture:
    """Plot the value against one hyperparameter; a ring marks the best trial."""
    shown = [trial for trial in complete if name in trial.params]
    values, numbers = _values_of(shown), np.array([trial.number for trial in shown])
    with _new_axes(4.2, 3) as axes:
        where = _place(axes, "x", name, shown)
        is_discrete = axes.get_xscale() == "linear" and (where == where.round()).all()
        if is_discrete and np.ptp(where) < MAX_JITTERED:
            axes.set_xlim(where.min() - 0.5, where.max() + 0.5)
            where += np.random.default_rng(0).uniform(-0.15, 0.15, len(where))
        axes.scatter(where, values, _size(len(values)), numbers, cmap=AGES, alpha=0.8, linewidth=0)
        ring = numbers == best.number
        axes.plot(where[ring], values[ring], "o", ms=11, mfc="none", mec=ORANGE, mew=2, clip_on=False)
        axes.set_ylabel(f"validation {metric}")
        _focus(axes, _values_of(complete))
        return _picture(axes, f"Validation {metric} of the completed trials against {name}.")


def draw_contour(names: Sequence[str], complete: Sequence[FrozenTrial], metric: str = "accuracy") -> Picture | None:
    """Plot the value over two hyperparameters, interpolated in triangles between the trials.

    Returns None if all trials lie on one line, which gives no triangle.
    """
    shown = [trial for trial in complete if set(names) <= trial.params.keys()]
    values = _values_of(shown)
    with _new_axes() as axes:
        x, y = _place(axes, "x", names[0], shown), _place(axes, "y", names[1], shown)
        points = axes.transScale.transform(np.column_stack([x, y]))
        points = (points - points[0]) / np.ptp(points, axis=0)
        if np.linalg.matrix_rank(points, tol=1e-6) < 2:
            return None
        triangles = Triangulation(x, y, Triangulation(*points.T).triangles)
        levels = np.linspace(*_range(values), N_LEVELS)
        drawn = axes.tricontourf(triangles, values, levels=levels, cmap="Blues", extend="min")
        axes.figure.colorbar(drawn, ax=axes, label=f"validation {metric}", format="%.3f")
        axes.scatter(x, y, _size(len(shown)) / 3, "black", linewidth=0, alpha=0.5)
        axes.use_sticky_edges = False  # leaves a margin
        axes.autoscale_view()
        return _picture(axes, f"Contour plot of the validation {metric} over {names[0]} and {names[1]}.")


def draw_curves(trials: Sequence[FrozenTrial], best: FrozenTrial | None, metric: str = "accuracy") -> Picture:
    """Plot the value per epoch of at most `MAX_CURVES` trials."""
    shown = _thin(trials)
    legend = {"complete": BLUE, "pruned": COLORS[TrialState.PRUNED], "failed or running": GREY}
    with _new_axes() as axes:
        for trial in shown:
            epochs, values = zip(*sorted(trial.intermediate_values.items()), strict=True)
            color = COLORS.get(trial.state, GREY)
            style: dict[str, Any] = {"color": color, "linewidth": 1, "alpha": 0.55}
            if best is not None and trial.number == best.number:
                style = {"color": ORANGE, "linewidth": 2.4, "zorder": 3}
                legend[f"trial {trial.number}"] = ORANGE
            axes.plot(epochs, values, **style)
            if trial.state == TrialState.PRUNED:
                axes.plot(epochs[-1], values[-1], "o", markersize=3, color=color)
        used = {ORANGE, *(COLORS.get(trial.state, GREY) for trial in shown)}
        lines = {name: Line2D([], [], color=color) for name, color in legend.items() if color in used}
        axes.legend(lines.values(), lines.keys(), loc="lower right")
        axes.set(xlabel="epoch", ylabel=f"validation {metric}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        reports = np.array([value for trial in shown for value in trial.intermediate_values.values()])
        note = _focus(axes, reports, share=0.05)
        if len(shown) < len(trials):
            which = f"the {N_BEST_CURVES} best and an even sample of the rest"
            note += f" Showing {len(shown)} of {len(trials):,} curves: {which}."
        return _picture(axes, f"Learning curves of {len(shown)} trials; curves of pruned trials end early.", note)


def _thin(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return at most `MAX_CURVES` trials: the best completed ones and an even sample of the rest."""
    if len(trials) <= MAX_CURVES:
        return list(trials)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    kept = {trial.number for trial in sorted(complete, key=by_value)[:N_BEST_CURVES]}
    rest = [trial for trial in trials if trial.number not in kept]
    kept |= {rest[i].number for i in np.linspace(0, len(rest) - 1, MAX_CURVES - len(kept)).astype(int)}
    return [trial for trial in trials if trial.number in kept]


def _values_of(trials: Sequence[FrozenTrial]) -> NDArray[np.float64]:
    return np.array([trial.value or 0.0 for trial in trials])


def _place(axes: Axes, x_or_y: Literal["x", "y"], name: str, trials: Sequence[FrozenTrial]) -> NDArray[np.float64]:
    """Return the trials' places on the x or y axis for a hyperparameter, and set up that axis."""
    distribution: Any = trials[0].distributions[name]
    settings: dict[str, Any] = {"label": name}
    if isinstance(distribution, CategoricalDistribution):
        settings |= {"ticks": range(len(distribution.choices)), "ticklabels": map(str, distribution.choices)}
    elif distribution.log:
        settings["scale"] = "log"
    elif isinstance(distribution, IntDistribution):
        axes.locator_params(x_or_y, integer=True)
    axes.set(**{x_or_y + key: value for key, value in settings.items()})
    return np.array([distribution.to_internal_repr(trial.params[name]) for trial in trials], dtype=float)


def _size(n_points: int) -> float:
    return float(np.clip(6000 / n_points, 8, 40))


def _range(values: NDArray[np.float64], share: float = 0.25) -> tuple[float, float]:
    """Return a range that leaves out a few very low values, which would squeeze the rest."""
    finite = values[np.isfinite(values)]
    top, low = finite.max(), np.quantile(finite, share)
    bottom = max(finite.min(), low - (top - low))
    room = 0.08 * max(top - bottom, 0.005)
    return bottom - room, top + room


def _focus(axes: Axes, values: NDArray[np.float64], share: float = 0.25) -> str:
    """Crop the vertical axis to the range of the values. Returns a note with the number of points below it."""
    if not np.isfinite(values).any():
        return ""
    bottom, top = _range(values, share)
    axes.set_ylim(bottom, top)
    n_below = int((values[np.isfinite(values)] < bottom).sum())
    are = "point below the axis range is" if n_below == 1 else "points below the axis range are"
    return f"{n_below} {are} not shown." if n_below else ""


def _picture(axes: Axes, alt: str, note: str = "") -> Picture:
    """Return the figure of the axes, rendered once per theme."""
    figure: Any = axes.figure
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            low, high = axis.get_view_interval()
            digits = "1" if high > 300 * low else "125" if high > 10 * low else "12345678"
            plain = FuncFormatter(lambda value, _, digits=digits: f"{value:g}" if f"{value:e}"[0] in digits else "")
            axis.set_major_formatter(plain)
            axis.set_minor_formatter(plain)
    sources = {}
    for theme, (ink, line) in THEMES.items():
        for ax in figure.axes:
            ax.tick_params(which="both", color=ink, grid_color=line)
            ax.spines[:].set_color(line)
        for text in figure.findobj(Text):
            text.set_color(ink)
        figure.canvas.draw()
        image, file = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())), io.BytesIO()
        image.quantize(256).save(file, "PNG", optimize=True)  # with 256 colors, a third of the size
        sources[theme] = base64.b64encode(file.getvalue()).decode()
    return Picture(alt, note=note.strip(), **sources)
