"""The report: complete and harmless for any study, correct, and readable offline."""

import json
import random
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from hpsearch import __main__
from hpsearch.bundle import bundle, formats
from hpsearch.bundle.evaluation import evaluate
from hpsearch.config.definition import StudyDefinition, load_definition, parse_definition
from hpsearch.data.dataset import ImageData, load_test
from hpsearch.errors import UsageError
from hpsearch.monitor.report import advise, write_report
from hpsearch.plugins import NETWORKS, find
from hpsearch.search.study import open_study
from hpsearch.storage.rdb import open_storage
from hpsearch.training.kinds import MLPHyperparameters
from hpsearch.training.networks import build_network

SEARCH = {
    "depth": {"int": [1, 3]},
    "width": {"int": [8, 32], "log": True},
    "lr": {"float": [1e-3, 1e-1], "log": True},
    "optimizer": {"choice": ["adam", "sgd"]},
    "momentum": {"float": [0.0, 0.95], "when": {"optimizer": ["sgd"]}},
}
PARAMS: dict[str, Any] = {"depth": 2, "width": 16, "lr": 0.01, "optimizer": "adam"}
VOID = {"meta", "source", "img", "br"}


@dataclass
class Page(HTMLParser):
    """What a parser finds in a report: its tags, its attributes and its text."""

    source: str
    open: list[str] = field(default_factory=list)
    attributes: list[tuple[str, str, str]] = field(default_factory=list)
    text: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.source)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs] or [(tag, "", "")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data

    def values_of(self, tag: str, name: str) -> list[str]:
        return [value for each, attribute, value in self.attributes if (each, attribute) == (tag, name)]


def make_definition(search: dict[str, Any]) -> StudyDefinition:
    study = {"name": "small", "storage": "sqlite:///small.db"}
    data = {"name": "digits", "validation": 200, "train": 300}
    return parse_definition({"study": study, "budget": {"trials": 4, "epochs": 2}, "data": data, "search": search})


def make_trial(
    state: TrialState = TrialState.COMPLETE, value: float = 0.9, epochs: int = 2, **attributes: Any
) -> FrozenTrial:
    params = attributes.pop("params", PARAMS)
    dimensions = make_definition(SEARCH).search
    study = optuna.create_study()
    asked = study.ask()
    for name in params:
        dimensions[name].suggest(asked, name)
    distributions = study.trials[0].distributions
    trial = create_trial(
        state=state,
        value=value if state in (TrialState.COMPLETE, TrialState.PRUNED) else None,
        params=params,
        distributions=distributions,
        intermediate_values={i + 1: value * (i + 1) / epochs for i in range(epochs)},
        user_attrs={"worker": "host-0"} | attributes,
    )
    trial.datetime_start = datetime(2026, 1, 1)
    if state.is_finished():
        trial.datetime_complete = trial.datetime_start + timedelta(seconds=epochs)
    return trial


def make_study(trials: Sequence[FrozenTrial], **attributes: Any) -> optuna.Study:
    study = optuna.create_study(direction="maximize", study_name="small")
    for name, value in ({"budget": {"trials": 4, "epochs": 2}} | attributes).items():
        study.set_user_attr(name, value)
    study.add_trials(trials)
    return study


@pytest.fixture
def definition() -> StudyDefinition:
    return make_definition(SEARCH)


@pytest.fixture
def report(tmp_path: Path, definition: StudyDefinition) -> Callable[..., Page]:
    """Writes the report of trials and parses it."""

    def write(trials: Sequence[FrozenTrial], folder: Path | None = None, **attributes: Any) -> Page:
        file = tmp_path / "report.html"
        study = make_study(trials, **attributes)
        write_report(definition, study, file, bundle=folder, command="studies/small.toml")
        page = Page(file.read_text(encoding="utf-8"))
        assert page.open == []
        for paragraph in re.findall(r"<p[ >].*?</p>", page.source, re.DOTALL):
            text = unescape(re.sub(r"<[^>]*>", "", paragraph))
            assert not re.search(r"[a-z0-9)][.:;,][A-Z]|[a-z)][.:;,][0-9]", text), "a space is missing"
        return page

    return write


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, digits: ImageData, forked_verification: None) -> Path:
    """A bundle made from a trial with `PARAMS`."""
    hyperparameters = MLPHyperparameters(**PARAMS)
    network = build_network("mlp", hyperparameters, digits.image_shape, 10)
    guesses = np.eye(10, dtype=np.float32)[[0, 1, 2, 3, 4, 5, 6, 7, 8, 1]]
    evaluation = evaluate(guesses, np.arange(10), digits.class_names)
    config = {"format_version": 2, "data": "digits", "kind": "mlp", "hyperparameters": hyperparameters.model_dump()}
    config |= {"image_shape": list(digits.image_shape), "mean": [*digits.mean], "std": [*digits.std]}
    config |= {"preparation": {"kind": "digit"}}
    config |= {"class_names": list(digits.class_names)}
    config |= {"layers": find(NETWORKS, "mlp").describe(hyperparameters, digits.image_shape, 10)}
    metrics: dict[str, Any] = {
        **{
            "study": "small",
            "trial": 0,
            "n_trials": 9,
            "epochs": 2,
            "n_members": 1,
            "shift": 0,
            "n_parameters": 1234,
            "test_reads": 2,
            "confirmed": None,
        },
        **{"validation_accuracy": 0.9, "test_accuracy": 0.8, "test_interval": [0.755, 0.838]},
        "calibration": {"error": 0.0123, "bins": [{"confidence": 0.9, "accuracy": 0.8, "n": 360}]},
        "metric": "accuracy",
        "test_balanced_accuracy": 0.79,
        "test_balanced_interval": [0.74, 0.83],
        "test_accuracies": {"of_each_seed": [0.8, 0.7], "mean": 0.75, "std": 0.07},
        "n_images": {"train": 500, "validation": 200, "test": 360},
        "per_class": evaluation.per_class,
        "confusion_matrix": evaluation.confusion_matrix,
        "versions": {"python": "3.11.7", "torch": "2.14.9"},
    }
    target = tmp_path_factory.mktemp("models") / "small"
    contents = bundle.Contents(network, config, metrics, evaluation, '[study]\nname = "small"\n')
    images, labels = load_test("digits")
    bundle.save(contents, target, images[:20], labels[:20].numpy())
    return target


def test_a_study_without_trials_has_a_report_that_says_so(report: Callable[..., Page]) -> None:
    page = report([])
    assert "No trial has completed yet" in page.text
    assert "No trial has started." in page.text
    assert page.values_of("img", "src") == []


def test_a_study_without_complete_trials_shows_its_curves_and_failures(report: Callable[..., Page]) -> None:
    failed = make_trial(TrialState.FAIL, failure={"kind": "exception", "message": "out of paper"})
    page = report([failed, failed, make_trial(TrialState.PRUNED, 0.3, 1), make_trial(TrialState.RUNNING)])
    assert "No trial has completed yet" in page.text
    assert "0 complete, 1 pruned" in page.text
    assert "2failedexception: out of paper" in page.text
    assert len(page.values_of("img", "src")) == 1, "there should be learning curves alone"


def test_what_went_wrong_are_failures_and_divergences_and_not_prunings(report: Callable[..., Page]) -> None:
    reason = {"epoch": 1, "value": 0.3, "threshold": 0.4, "rule": "median of 9 trials"}
    pruned = [make_trial(TrialState.PRUNED, 0.3, 1, pruning=reason), make_trial(TrialState.PRUNED, diverged="NaN")]
    page = report([make_trial(), *pruned])
    assert "".join(page.text.partition("What went wrong")[2].split()).startswith(
        "trialsoutcomereason1divergedNaNReproduce"
    )
    assert "What went wrong" not in report([make_trial(), pruned[0]]).text


def test_equal_combinations_count_once_and_pauses_do_not(report: Callable[..., Page]) -> None:
    trials = [make_trial(), make_trial(), make_trial(params=PARAMS | {"width": 9})]
    pause = ["2026-01-01T00:00:30+00:00", "2026-01-01T00:10:30+00:00"]
    for trial, minute, seconds in zip(trials, (0, 0, 11), (60, 630, 60), strict=True):
        begun = datetime(2026, 1, 1, 0, minute, tzinfo=UTC).astimezone().replace(tzinfo=None)
        trial.datetime_start, trial.datetime_complete = begun, begun + timedelta(seconds=seconds)
    trials[1].user_attrs["pauses"] = [pause]
    page = report(trials)
    assert "The search tried 2 hyperparameter combinations" in page.text
    assert "total training time2 min of searching" in page.text
    assert "The search took 2 min without pauses." in page.text


@pytest.mark.parametrize("n", [1, 3])
def test_few_trials_give_a_verdict_and_no_importances(report: Callable[..., Page], n: int) -> None:
    page = report([make_trial(value=0.9 + i / 100) for i in range(n)])
    assert f"The best of {n} trial{'s' if n > 1 else ''} classifies {0.9 + (n - 1) / 100:.2%}" in page.text
    assert "has not been evaluated on the test set" in page.text
    assert "Not enough data for importances" in page.text
    assert "Validation accuracy of the completed trials against width." in page.values_of("img", "alt")


def test_the_interval_of_the_best_value_is_that_of_its_number_of_images(report: Callable[..., Page]) -> None:
    # Wilson score interval of 180 in 200, from the formula by hand
    page = report([make_trial(value=0.9)])
    assert "an accuracy of 90.00% has a 95% confidence interval of 85.1% to 93.4%" in page.text


def test_enough_trials_give_importances_and_a_map(report: Callable[..., Page]) -> None:
    trials = [make_trial(value=0.8 + i / 100, params=PARAMS | {"width": 8 + i, "lr": 0.01 + i / 500}) for i in range(8)]
    page = report(trials)
    assert "(PED-ANOVA over 8 completed or pruned trials; with so few, only a rough guide)" in page.text
    assert "Importance of each hyperparameter as a bar chart." in page.values_of("img", "alt")
    [title] = re.findall(r"<h3>(\w+ and \w+)</h3>", page.source)
    assert set(title.split(" and ")) == {"width", "lr"}, "the map should be of those that vary"


def test_trials_on_one_line_have_importances_and_no_map(report: Callable[..., Page]) -> None:
    widths = (8, 12, 16, 20, 24, 28)
    page = report([make_trial(value=0.8 + n / 200, params={"width": n, "lr": n / 1000}) for n in widths])
    assert "Importance of each hyperparameter as a bar chart." in page.values_of("img", "alt")
    assert not [alt for alt in page.values_of("img", "alt") if alt.startswith("Contour plot")]


def test_pruned_trials_count_for_importances(report: Callable[..., Page]) -> None:
    good, bad = {"width": 16, "lr": 0.01}, {"width": 16, "lr": 0.0011}
    page = report([make_trial(value=0.9, params=good)] + [make_trial(TrialState.PRUNED, 0.5, 1, params=bad)] * 9)
    assert "PED-ANOVA over 10 completed or pruned trials" in page.text
    assert "Importance of each hyperparameter as a bar chart." in page.values_of("img", "alt")


def test_equal_trials_have_no_importances(report: Callable[..., Page]) -> None:
    assert "Not enough data for importances" in report([make_trial(value=0.9) for _ in range(9)]).text


def test_what_pruning_saved_is_counted(report: Callable[..., Page]) -> None:
    page = report([make_trial(), make_trial(TrialState.PRUNED, 0.5, 1), make_trial(TrialState.PRUNED, 0.5, 1)])
    assert "4 epochs in 4 s of training" in page.text
    assert "stopped 2 unpromising trials early and saved 2 epochs, about 2 s (33%" in page.text


HOSTILE = "<script>alert(1)</script><img src=https://x.org/a.png onerror=alert(1)>\"' $\\frac{$ \ud800 \0"


def test_text_from_the_study_cannot_become_markup(report: Callable[..., Page]) -> None:
    complete, failed = make_trial(), make_trial(TrialState.FAIL, failure={"kind": HOSTILE, "message": HOSTILE})
    for trial in (complete, failed):
        trial.user_attrs["worker"] = HOSTILE
    page = report([complete, complete, failed])
    assert "<script" not in page.source
    assert page.text.count("alert(1)") >= 4
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    assert all(source.startswith("data:image/png") for source in page.values_of("img", "src"))


def test_a_choice_with_the_signs_of_a_formula_is_drawn(report: Callable[..., Page]) -> None:
    trial = make_trial(params={"width": 16})
    distribution = optuna.distributions.CategoricalDistribution(["$\\frac{$", "<b>"])
    trial.params["optimizer"], trial.distributions["optimizer"] = "$\\frac{$", distribution
    assert "$\\frac{$" in report([trial] * 2).text


def test_nothing_is_loaded_from_elsewhere_and_nothing_runs(report: Callable[..., Page], exported: Path) -> None:
    page = report([make_trial()], exported)
    for tag, name, value in page.attributes:
        assert tag not in ("script", "link", "iframe", "object", "base", "form")
        if name in ("src", "srcset", "href", "poster", "action"):
            assert value.startswith("data:image/png;base64,")
    assert not re.search(r"url\(|@import|https?://", page.source)


def test_every_picture_has_words_and_a_dark_twin(report: Callable[..., Page]) -> None:
    page = report([make_trial(value=0.9 + i / 100) for i in range(3)])
    assert all(page.values_of("img", "alt"))
    assert len(page.values_of("source", "srcset")) == len(page.values_of("img", "src")) > 3
    assert set(page.values_of("source", "srcset")).isdisjoint(page.values_of("img", "src"))


def test_a_bundle_adds_test_accuracy_loading_and_pictures(report: Callable[..., Page], exported: Path) -> None:
    page = report([make_trial()], exported)
    assert "classifies 80.00% of 360 test images correctly" in page.text
    assert "95% confidence interval 75.5% to 83.8%" in page.text
    assert "was evaluated by 2 exports of this study" in page.text
    assert f'hpsearch.load("{exported}")' in page.text
    assert " ".join(formats.FORMATS["model.pt"].loading.split()) in page.text
    assert "differ by 1.23% on average" in page.text
    assert "9 → 1 (1)" in page.text
    titles = ("Confusion matrix", "Most confident errors", "Calibration")
    assert {f"{title} of the exported model on the test set" for title in titles} <= set(page.values_of("img", "alt"))


def test_the_study_knows_best_how_often_the_test_set_was_read(report: Callable[..., Page], exported: Path) -> None:
    reads = [{"at": "2026-01-01T00:00:00", "trial": 0}]
    assert "was evaluated by one export of this study" in report([make_trial()], exported, test_reads=reads).text


def test_a_damaged_bundle_is_named_and_left_out(report: Callable[..., Page], exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "small"))
    (folder / "model.safetensors").write_bytes(b"torn")
    page = report([make_trial()], folder)
    assert "model.safetensors was changed after the export" in page.text
    assert "test images correctly" not in page.text


@pytest.mark.parametrize("params", [PARAMS | {"width": 17}, {}], ids=["other values", "no such trial"])
def test_a_bundle_of_an_earlier_search_of_that_name_is_left_out(
    report: Callable[..., Page], exported: Path, params: dict[str, Any]
) -> None:
    page = report([make_trial(params=params)], exported)
    assert "was exported from a different search with the same name; export again" in page.text
    assert "test images correctly" not in page.text


def test_a_confirmed_winner_is_the_verdict_rather_than_the_best_value(report: Callable[..., Page]) -> None:
    candidates = [
        {"number": 1, "search_value": 0.93, "accuracies": [0.915, 0.915], "mean": 0.915, "interval": [0.915, 0.915]},
        {"number": 0, "search_value": 0.95, "accuracies": [0.90, 0.91], "mean": 0.905, "interval": None},
    ]
    confirmation = {"seeds": 2, "epochs": 5, "winner": 1, "is_tie": True, "optimism": 0.03, "at": "2026-01-01T00:00:00"}
    confirmation["candidates"] = [candidate | {"n_parameters": 12_345} for candidate in candidates]
    page = report([make_trial(value=0.95), make_trial(value=0.93)], confirmation=confirmation)
    assert "with 2 new seeds, trial 1 reaches 91.50%" in page.text
    assert "95% CI 86.81% to 94.63%" in page.text, "of an older version, without width"
    assert "Other trials are statistically tied with it; it has the smallest network." in page.text
    assert "3.0 percentage points too optimistic" in page.text
    assert "Hyperparameters of trial 1" in page.text
    assert "hpsearch confirm studies/small.toml --top 2 --seeds 2" in page.text


ADVICE = [
    ("lr", {"float": [1e-3, 1e-1], "log": True}, 1.05e-3, "{float = [0.0001, 0.1], log = true}"),
    ("lr", {"float": [1e-3, 1e-1], "log": True}, 0.1, "{float = [0.001, 1.0], log = true}"),
    ("width", {"int": [16, 128], "log": True}, 128, "{int = [16, 256], log = true}"),
    ("depth", {"int": [2, 4]}, 4, "{int = [2, 5]}"),
    ("dropout", {"float": [0.1, 0.5]}, 0.1, "{float = [0.0, 0.5]}"),
    ("dropout", {"float": [0.0, 0.5]}, 0.5, "{float = [0.0, 0.75]}"),
    ("dropout", {"float": [0.0, 0.9]}, 0.9, "{float = [0.0, 0.956]}"),
    ("batch_size", {"int": [32, 96], "step": 32}, 96, "{int = [32, 128], step = 32}"),
]
SILENCE = [
    ("lr", {"float": [1e-3, 1e-1], "log": True}, 0.01),
    ("lr", {"float": [1e-3, 1e-1], "log": True}, 0.003),  # within 2% of the range, were it not logarithmic
    ("dropout", {"float": [0.0, 0.5]}, 0.0),  # no less is possible
    ("augment", {"float": [0.0, 1.0]}, 1.0),
    ("depth", {"int": [1, 3]}, 1),
    ("depth", {"int": [2, 2]}, 2),
    ("depth", {"int": [2, 3]}, 3),  # its values all lie at an end
    ("dropout", {"float": [0.1, 0.2], "step": 0.1}, 0.2),
]


def advise_on(name: str, dimension: dict[str, Any], value: Any) -> list[dict[str, str]]:
    definition = make_definition({name: dimension})
    trial = optuna.trial.create_trial(
        value=0.9, params={name: value}, distributions={name: optuna.distributions.CategoricalDistribution([value])}
    )
    return list(advise(definition, trial))


@pytest.mark.parametrize(("name", "dimension", "value", "wider"), ADVICE)
def test_a_value_at_an_end_of_its_range_brings_the_line_to_change(
    name: str, dimension: dict[str, Any], value: Any, wider: str
) -> None:
    [advice] = advise_on(name, dimension, value)
    assert advice["then"] == f"{name} = {wider}"
    assert advice["now"].startswith(f"{name} = {{")


@pytest.mark.parametrize(("name", "dimension", "value"), SILENCE)
def test_a_value_that_is_inside_or_cannot_go_further_brings_no_advice(
    name: str, dimension: dict[str, Any], value: Any
) -> None:
    assert advise_on(name, dimension, value) == []


def test_the_line_to_change_keeps_the_condition(definition: StudyDefinition) -> None:
    trial = make_trial(params=PARAMS | {"optimizer": "sgd", "momentum": 0.95})
    [advice] = [entry for entry in advise(definition, trial) if entry["name"] == "momentum"]
    assert advice["then"] == 'momentum = {when = {optimizer = ["sgd"]}, float = [0.0, 0.98]}'


def test_the_report_of_three_thousand_trials_is_small(report: Callable[..., Page]) -> None:
    generator = random.Random(0)
    complete, pruned = make_trial(), make_trial(TrialState.PRUNED)
    trials = []
    for i in range(3000):
        value = generator.gauss(0.9, 0.01)
        copy = optuna.trial.create_trial(
            state=complete.state if i % 2 else pruned.state,
            value=value,
            params=PARAMS | {"width": generator.randint(8, 32), "lr": 10 ** generator.uniform(-3, -1)},
            distributions=complete.distributions,
            intermediate_values={1: value / 2, 2: value},
        )
        trials.append(copy)
    page = report(trials)
    assert len(page.source) < 2_000_000
    assert "Showing 120 of 3,000 curves" in page.text
    assert "over 3,000 completed or pruned trials)." in page.text


def test_a_report_that_cannot_be_written_leaves_the_older_one(tmp_path: Path, definition: StudyDefinition) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(UsageError, match=r"cannot write .*report\.html"):
        write_report(definition, make_study([make_trial()]), tmp_path / "report.html", command="small")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_only_a_report_of_the_same_study_is_replaced_without_force(tmp_path: Path, definition: StudyDefinition) -> None:
    file, study = tmp_path / "small.db", make_study([make_trial()], id="0123abcd")
    file.write_text("all my trials")
    with pytest.raises(UsageError, match=r"is not a report of this study; .* --force"):
        write_report(definition, study, file, command="small")
    assert file.read_text() == "all my trials"
    write_report(definition, study, file, command="small", force=True)
    write_report(definition, study, file, command="small again")
    before = file.read_text()
    assert "small again" in before
    with pytest.raises(UsageError, match="is not a report of this study"):
        write_report(definition, make_study([make_trial()], id="89abcdef"), file, command="small")
    assert file.read_text() == before
    assert [each.name for each in tmp_path.iterdir()] == ["small.db"]


def test_a_report_of_an_older_version_or_from_before_the_study_had_an_id_is_replaced(
    tmp_path: Path, definition: StudyDefinition
) -> None:
    file, study = tmp_path / "report.html", make_study([make_trial()], id="0123abcd")
    write_report(definition, make_study([make_trial()]), file, command="before")
    write_report(definition, study, file, command="after")
    assert "after" in file.read_text()
    file.write_text(re.sub('<meta name="generator".*\n', "", file.read_text()))
    write_report(definition, study, file, command="again")
    file.write_text("<title>another: hyperparameter search report</title>")
    with pytest.raises(UsageError, match="is not a report of this study"):
        write_report(definition, study, file, command="small")


def test_a_report_in_a_missing_folder_is_refused_before_it_is_drawn(
    tmp_path: Path, definition: StudyDefinition, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("hpsearch.monitor.report._collect")
    with pytest.raises(UsageError, match=r"folder .*missing does not exist; choose another --output"):
        write_report(definition, make_study([make_trial()]), tmp_path / "missing" / "report.html", command="small")


def test_a_report_goes_into_no_device_and_no_bundle(
    tmp_path: Path, definition: StudyDefinition, exported: Path
) -> None:
    device = tmp_path / "device"
    device.symlink_to("/dev/null")
    study = make_study([make_trial()])
    with pytest.raises(UsageError, match="not a regular file"):
        write_report(definition, study, device, command="small", force=True)
    with pytest.raises(UsageError, match="is a model folder"):
        write_report(definition, study, exported / "report.html", command="small", force=True)
    bundle.load(exported)


@pytest.fixture
def command(
    study_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Runs `hpsearch report small.toml` with options beside the study file; gives exit status, stdout and stderr."""
    study_file()
    monkeypatch.chdir(tmp_path)

    def call(*options: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hpsearch", "report", "small.toml", *options])
        with pytest.raises(SystemExit) as caught:
            __main__.main()
        output = capfd.readouterr()
        return int(caught.value.code or 0), output.out, output.err

    return call


def test_the_verb_prints_the_file_that_it_wrote_and_nothing_else(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    definition = load_definition("small.toml")
    storage = open_storage(definition.study.storage)
    study = open_study(definition, storage)
    trial = make_trial(params={"width": 16, "lr": 0.01})
    study.add_trial(trial)
    (tmp_path / "models" / "small").mkdir(parents=True)
    (tmp_path / "models" / "small" / "metrics.json").write_text(json.dumps({"study": "other"}))
    status, out, err = command()
    assert (status, out) == (0, "small-report.html\n")
    assert err.endswith("to add it: hpsearch export small.toml, then run report again\n")
    page = Page((tmp_path / "small-report.html").read_text())
    assert "hpsearch run small.toml" in page.text
    assert "was ignored" not in page.text, "the bundle of another study in models/small should not be looked at"
    (tmp_path / "models" / "small" / "metrics.json").write_text(json.dumps({"study": "small"}))
    assert command("--output", "other.html")[:2] == (0, "other.html\n")
    assert "The exported model was ignored" in Page((tmp_path / "other.html").read_text()).text
    (tmp_path / "other.html").write_text("mine")
    assert command("--output", "other.html")[0] == 2
    assert command("--output", "other.html", "--force")[:2] == (0, "other.html\n")
    monkeypatch.setenv("HOME", str(tmp_path / "models"))
    assert command("--output=~/mine.html")[:2] == (0, f"{tmp_path}/models/mine.html\n")
    assert not (tmp_path / "~").exists()
    storage.engine.dispose()


def test_the_report_of_a_missing_study_is_an_error_of_one_line(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    before = set(tmp_path.iterdir())
    status, out, err = command()
    assert (status, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert set(tmp_path.iterdir()) == before
