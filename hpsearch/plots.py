"""The pictures of a report: Optuna's plots and the learning curves, each for a light and for a dark page."""

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

BLUE, ORANGE, GREY = "#3f83c9", "#e0802b", "#8d96a3"
THEMES = {"light": ("#39434f", "#dfe4ea"), "dark": ("#c3cbd5", "#39424e")}  # of text, of lines
SETTINGS: Any = {
    "figure.constrained_layout.use": True,
    "figure.figsize": (5.4, 3.4),
    "text.parse_math": False,  # a name with dollars would be read as a formula
    "savefig.dpi": 170,
}
MAX_CURVES = 120
N_BEST_CURVES = 20


@dataclass(frozen=True)
class Picture:
    """PNG files in base64, and in words what they show."""

    alt: str
    light: str
    dark: str
    note: str = ""


@contextmanager
def _pyplot() -> Iterator[None]:
    """Optuna's plots go through pyplot, change its style for good, and warn that they are experimental."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            plt.close("all")


def rank_hyperparameters(study: optuna.Study, names: Sequence[str]) -> dict[str, float]:
    """The importance of each hyperparameter by PED-ANOVA, the greatest first; they sum to one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return optuna.importance.get_param_importances(study, params=list(names))


def draw_history(study: optuna.Study, values: Sequence[float]) -> Picture:
    """The value of each complete trial, and the best so far."""
    with _pyplot():
        axes = optuna.visualization.matplotlib.plot_optimization_history(study)
        for points in axes.collections:
            points.set(sizes=[_size(len(values))], facecolor=BLUE, alpha=0.55, linewidth=0)
        for line in axes.lines:
            line.set(color=ORANGE, linewidth=2, alpha=1, drawstyle="steps-post")
        handles, _ = axes.get_legend_handles_labels()
        axes.legend(handles, ["complete trial", "best so far"], loc="lower right", frameon=False)
        axes.set(xlabel="trial", ylabel="validation accuracy")
        note = _focus(axes, values)
        return _picture(axes, f"Validation accuracy of {len(values)} complete trials in their order.", note)


def draw_importances(study: optuna.Study, names: Sequence[str]) -> Picture:
    """How much of the variation between the trials each hyperparameter explains."""
    with _pyplot():
        axes = optuna.visualization.matplotlib.plot_param_importances(study, params=list(names))
        for bar in axes.patches:
            bar.set(color=BLUE)
        axes.set(xlabel="share of importance", ylabel="")
        axes.grid(visible=False, axis="y")
        if legend := axes.get_legend():
            legend.remove()
        return _picture(axes, "Importance of each hyperparameter, as bars.")


def draw_slice(study: optuna.Study, name: str, best: FrozenTrial, values: Sequence[float]) -> Picture:
    """The validation accuracy over one hyperparameter; a ring marks the best trial."""
    with _pyplot():
        axes: Any = optuna.visualization.matplotlib.plot_slice(study, params=[name])
        [points, _] = axes.collections
        points.set(sizes=[_size(len(values))], edgecolor=GREY, linewidth=0.3)
        points.colorbar.set_label("trial")
        if name in best.params:
            value = best.params[name]
            is_choice = isinstance(best.distributions[name], optuna.distributions.CategoricalDistribution)
            where = repr(value) if is_choice else value
            axes.scatter([where], [best.value], s=110, facecolor="none", edgecolor=ORANGE, linewidth=2, zorder=3)
            axes.margins(x=0.08)
            axes.autoscale(axis="x")
        axes.set(xlabel=name, ylabel="validation accuracy")
        note = _focus(axes, values)
        return _picture(axes, f"Validation accuracy of the complete trials over {name}.", note)


def draw_contour(study: optuna.Study, names: Sequence[str], n_trials: int) -> Picture:
    """The validation accuracy over two hyperparameters, interpolated between the trials."""
    from matplotlib.contour import ContourSet

    with _pyplot():
        axes: Any = optuna.visualization.matplotlib.plot_contour(study, params=list(names))
        for collection in axes.collections:
            if not isinstance(collection, ContourSet):
                collection.set(sizes=[_size(n_trials) / 2], alpha=0.6)
        return _picture(axes, f"Validation accuracy over {names[0]} and {names[1]}, as a map.")


def draw_curves(trials: Sequence[FrozenTrial], best: FrozenTrial | None) -> Picture:
    """The validation accuracy after each epoch, of at most `MAX_CURVES` trials."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    shown = _thin(trials)
    colors = {TrialState.COMPLETE: BLUE, TrialState.PRUNED: ORANGE}
    with _pyplot():
        import matplotlib.pyplot as plt

        _, axes = plt.subplots()
        for trial in shown:
            epochs, values = zip(*sorted(trial.intermediate_values.items()), strict=True)
            is_best = best is not None and trial.number == best.number
            style: dict[str, Any] = {"linewidth": 2.6, "zorder": 3} if is_best else {"linewidth": 1, "alpha": 0.5}
            axes.plot(epochs, values, color=colors.get(trial.state, GREY), **style)
            if trial.state == TrialState.PRUNED:
                axes.plot(epochs[-1], values[-1], "o", markersize=3, color=ORANGE)
        legend = {"complete": BLUE, "pruned": ORANGE, "failed or running": GREY}
        used = {colors.get(trial.state, GREY) for trial in shown}
        labels = [name for name, color in legend.items() if color in used]
        axes.legend([Line2D([], [], color=legend[name]) for name in labels], labels, loc="lower right", frameon=False)
        axes.set(xlabel="epoch", ylabel="validation accuracy")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(visible=True)
        note = _focus(axes, [value for trial in shown for value in trial.intermediate_values.values()], share=0.05)
        if len(shown) < len(trials):
            note = (
                f"{len(shown)} of {len(trials):,} curves are drawn: the {N_BEST_CURVES} best, and others evenly spread."
            )
        return _picture(
            axes, f"Learning curves of {len(shown)} trials, the best one bold, pruned ones cut short.", note
        )


def _thin(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials, or where there are many the best complete ones and others spread evenly over the study."""
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
    """Cut a few far lower values off, which would press the others together; a note that says how many."""
    finite = np.array([value for value in values if np.isfinite(value)])
    if not len(finite):
        return ""
    top, low = finite.max(), np.quantile(finite, share)
    bottom = max(finite.min(), low - (top - low))
    room = 0.08 * max(top - bottom, 0.005)
    axes.set_ylim(bottom - room, top + room)
    n_below = int((finite < bottom - room).sum())
    return f"{n_below} {'point lies' if n_below == 1 else 'points lie'} below the picture." if n_below else ""


def _picture(axes: "Axes", alt: str, note: str = "") -> Picture:
    """The figure of the axes, drawn once for each theme."""
    from matplotlib.text import Text
    from matplotlib.ticker import FuncFormatter

    figure: Any = axes.figure
    axes.set_title("")
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    sources = {}
    for theme, (ink, line) in THEMES.items():
        for each in figure.axes:
            each.tick_params(which="both", colors=ink, labelsize=9)
            each.xaxis.label.set_size(10)
            each.yaxis.label.set_size(10)
            each.spines[:].set(color=line, linewidth=0.8)
            for grid_line in (*each.get_xgridlines(), *each.get_ygridlines()):
                grid_line.set(color=line, linewidth=0.7)
        for text in figure.findobj(Text):
            text.set_color(ink)
        file = io.BytesIO()
        figure.savefig(file, transparent=True)
        sources[theme] = base64.b64encode(file.getvalue()).decode()
    return Picture(alt, note=note, **sources)
