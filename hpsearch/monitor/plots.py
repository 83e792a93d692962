"""The plots of a report: Optuna's plots and the learning curves, each in a light and a dark version."""

import base64
import io
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREY = "#3f83c9", "#e0802b", "#98a2ae"
COLORS = {TrialState.COMPLETE: BLUE, TrialState.PRUNED: "#9a7bd0"}  # orange marks the best trial
THEMES = {"light": ("#39434f", "#dfe4ea"), "dark": ("#c3cbd5", "#39424e")}  # text, lines
SETTINGS: Any = {
    "figure.constrained_layout.use": True,
    "text.parse_math": False,  # otherwise a name with dollar signs is parsed as a formula
    "figure.dpi": 170,
}
MAX_JITTERED = 10  # jitter the points of integers and choices up to this span
MAX_CURVES = 120
N_BEST_CURVES = 20
MANY = 200  # above this number of points, the contour plot has lighter lines and points


@dataclass(frozen=True)
class Picture:
    """A plot as base64 PNG files, with its alternative text."""

    alt: str
    light: str
    dark: str
    note: str = ""


@contextmanager
def _pyplot(figsize: tuple[float, float] = (5.4, 3.4)) -> Iterator[None]:
    """Undo what Optuna's plots change in pyplot's style, and silence their warnings about being experimental."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(SETTINGS | {"figure.figsize": figsize}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def rank_hyperparameters(study: optuna.Study, names: Sequence[str]) -> dict[str, float]:
    """Return the importance of each hyperparameter by PED-ANOVA, largest first. They sum to one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return optuna.importance.get_param_importances(study, params=list(names))


def draw_history(study: optuna.Study, values: Sequence[float]) -> Picture:
    """Plot the value of each completed trial, and the best so far."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    with _pyplot():
        axes = optuna.visualization.matplotlib.plot_optimization_history(study)
        for points in axes.collections:
            points.set(sizes=[_size(len(values))], facecolor=BLUE, alpha=0.55, linewidth=0)
        for line in axes.lines:
            line.set(color=ORANGE, linewidth=2, alpha=1, drawstyle="steps-post")
        dot = Line2D([], [], color=BLUE, marker="o", markersize=5, linestyle="none")
        axes.legend([dot, axes.lines[0]], ["completed trial", "best so far"], loc="lower right", frameon=False)
        axes.set(xlabel="trial", ylabel="validation accuracy")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        note = _focus(axes, values)
        return _picture(axes, f"Validation accuracy of {len(values)} completed trials in order.", note)


def draw_importances(study: optuna.Study, names: Sequence[str]) -> Picture:
    """Plot the importance of each hyperparameter as a bar chart."""
    with _pyplot():
        axes = optuna.visualization.matplotlib.plot_param_importances(study, params=list(names))
        for bar in axes.patches:
            bar.set(color=BLUE)
        for label in axes.texts:
            label.set_text(f" {label.get_text()}")
        axes.set(xlabel="importance", ylabel="")
        axes.grid(visible=False, axis="y")
        if legend := axes.get_legend():
            legend.remove()
        return _picture(axes, "Importance of each hyperparameter as a bar chart.")


def draw_slice(study: optuna.Study, name: str, best: FrozenTrial, values: Sequence[float]) -> Picture:
    """Plot the validation accuracy against one hyperparameter; a ring marks the best trial."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.ticker import MaxNLocator

    with _pyplot(figsize=(4.2, 3)):
        axes: Any = optuna.visualization.matplotlib.plot_slice(study, params=[name])
        points = axes.collections[0]
        points.colorbar.remove()
        points.set(sizes=[_size(len(values))], linewidth=0, alpha=0.8)
        points.set_cmap(LinearSegmentedColormap.from_list("age", [GREY, BLUE]))
        where = points.get_offsets()
        distinct = np.unique(where[:, 0])
        is_integer = axes.get_xscale() == "linear" and (distinct == distinct.round()).all()
        if is_integer and np.ptp(distinct) < MAX_JITTERED:
            where[:, 0] += np.random.default_rng(0).uniform(-0.15, 0.15, len(where))
            points.set_offsets(where)
            axes.set_xlim(distinct[0] - 0.5, distinct[-1] + 0.5)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=len(distinct)))
        ticks = axes.get_xticks()
        labels = zip(ticks, axes.xaxis.get_major_formatter().format_ticks(ticks), strict=True)
        choices = {tick: label.strip("'") for tick, label in labels if label.startswith("'")}
        if choices:
            axes.set_xticks([*choices], [*choices.values()])
        ring = where[points.get_array() == best.number]
        axes.scatter(*ring.T, s=110, facecolor="none", edgecolor=ORANGE, linewidth=2, zorder=3, clip_on=False)
        axes.set(xlabel=name, ylabel="validation accuracy")
        _focus(axes, values)
        return _picture(axes, f"Validation accuracy of the completed trials against {name}.")


def draw_contour(study: optuna.Study, names: Sequence[str], n_trials: int) -> Picture:
    """Plot the validation accuracy as a contour plot of two hyperparameters, interpolated between the trials."""
    from matplotlib.contour import ContourSet

    with _pyplot():
        axes: Any = optuna.visualization.matplotlib.plot_contour(
            study, params=list(names), target_name="validation accuracy"
        )
        for collection in axes.collections:
            if isinstance(collection, ContourSet):
                collection.set(linewidth=0 if n_trials > MANY else 0.4)
            else:
                collection.set(sizes=[_size(n_trials) / 3], linewidth=0, alpha=0.3 if n_trials > MANY else 0.6)
        return _picture(axes, f"Contour plot of the validation accuracy over {names[0]} and {names[1]}.")


def draw_curves(trials: Sequence[FrozenTrial], best: FrozenTrial | None) -> Picture:
    """Plot the validation accuracy per epoch of at most `MAX_CURVES` trials."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    shown = _thin(trials)
    legend = {"complete": BLUE, "pruned": COLORS[TrialState.PRUNED], "failed or running": GREY}
    with _pyplot():
        import matplotlib.pyplot as plt

        _, axes = plt.subplots()
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
        axes.legend(lines.values(), lines.keys(), loc="lower right", frameon=False)
        axes.set(xlabel="epoch", ylabel="validation accuracy")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(visible=True)
        note = _focus(axes, [value for trial in shown for value in trial.intermediate_values.values()], share=0.05)
        if len(shown) < len(trials):
            which = f"the {N_BEST_CURVES} best and an even sample of the rest"
            note += f" Showing {len(shown)} of {len(trials):,} curves: {which}."
        return _picture(axes, f"Learning curves of {len(shown)} trials; curves of pruned trials end early.", note)


def _thin(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return at most `MAX_CURVES` trials: the best completed ones and an even sample of the rest."""
    if len(trials) <= MAX_CURVES:
        return list(trials)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    kept = {trial.number for trial in sorted(complete, key=lambda trial: -(trial.value or 0.0))[:N_BEST_CURVES]}
    rest = [trial for trial in trials if trial.number not in kept]
    kept |= {rest[i].number for i in np.linspace(0, len(rest) - 1, MAX_CURVES - len(kept)).astype(int)}
    return [trial for trial in trials if trial.number in kept]


def _size(n_points: int) -> float:
    return float(np.clip(6000 / n_points, 8, 40))


def _focus(axes: "Axes", values: Iterable[float], share: float = 0.25) -> str:
    """Crop the axis below a few very low values that would squeeze the rest. Returns a note with their number."""
    finite = np.array([value for value in values if np.isfinite(value)])
    if not len(finite):
        return ""
    top, low = finite.max(), np.quantile(finite, share)
    bottom = max(finite.min(), low - (top - low))
    room = 0.08 * max(top - bottom, 0.005)
    axes.set_ylim(bottom - room, top + room)
    n_below = int((finite < bottom - room).sum())
    are = "point below the axis range is" if n_below == 1 else "points below the axis range are"
    return f"{n_below} {are} not shown." if n_below else ""


def _picture(axes: "Axes", alt: str, note: str = "") -> Picture:
    """Return the figure of the axes, rendered once per theme."""
    import matplotlib.pyplot as plt
    from matplotlib.text import Text
    from matplotlib.ticker import FuncFormatter

    figure: Any = axes.figure
    axes.set_title("")
    axes.set_title("", loc="left")
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
            ax.tick_params(which="both", colors=ink, labelsize=9)
            ax.xaxis.label.set_size(10)
            ax.yaxis.label.set_size(10)
            ax.spines[:].set(color=line, linewidth=0.8)
            for grid_line in (*ax.get_xgridlines(), *ax.get_ygridlines()):
                grid_line.set(color=line, linewidth=0.7)
        for text in figure.findobj(Text):
            text.set_color(ink)
        sources[theme] = _to_png(figure)
    plt.close(figure)
    return Picture(alt, note=note.strip(), **sources)


def _to_png(figure: Any) -> str:
    """Return the figure on a transparent background with 256 colors, a third of the size."""
    from PIL import Image

    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
    figure.canvas.draw()
    file = io.BytesIO()
    Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).quantize(256).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()
