"""What a dashboard says of a study and of its trials, in Markdown."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from optuna.trial import FrozenTrial

from hpsearch.config.definition import N_TRAINING_IMAGES, StudyDefinition
from hpsearch.config.urls import show_url
from hpsearch.search.trials import explain_end, name_state

_COMMANDS = {
    "run": "search until the budget is spent, or go on",
    "status --watch": "watch the search in a terminal",
    "stop": "let the workers hand their trials back and end",
    "confirm": "find out whether the best trial was luck",
    "export": "retrain, measure and save the best network",
}


def describe_study(definition: StudyDefinition, budget: Mapping[str, Any], arguments: str) -> str:
    """What is searched, on which data, within which budget, how values are to be read, and what can be typed.

    `arguments` are those of the study, as they are typed after a verb.
    """
    data, tables = definition.data, definition.to_tables()
    n_train = data.train or N_TRAINING_IMAGES[data.name] - data.validation
    limits = {"minutes": "{} minutes", "target": "a value of {}", "failures": "{} failures"}
    ends = [text.format(budget[key]) for key, text in limits.items() if key in budget]
    epochs = f"{definition.budget.epochs} epochs"
    about = {
        "network": definition.network.kind,
        "data": f"{data.name}: {n_train:,} images to train on, {data.validation:,} to validate",
        "budget": f"{budget['trials']} trials of {epochs}; ends also after {', or after '.join(ends)}",
        "sampler, pruner": f"{definition.sampler.kind}, {definition.pruner.kind}",
        "seed": f"{definition.study.seed}, and {data.split_seed} for the split",
        "storage": show_url(definition.study.storage),
        "fixed": ", ".join(f"{name} {value}" for name, value in tables["fixed"].items()) or "nothing",
    }
    searched = [[name, *_describe_range(table)] for name, table in tables["search"].items()]
    typed = [(f"hpsearch {command} {arguments}", what) for command, what in _COMMANDS.items()]
    width = max(len(line) for line, _ in typed)
    parts = [
        f"## {_escape(definition.study.name)}",
        f"A value is the **validation accuracy** after {epochs}, or, of a pruned trial, after its last one. "
        "No test image is read in a search: `hpsearch export` reads them, once it is over.",
        *_table(["", ""], list(about.items())),
        "### SearchTime",
        *_table(["hyperparameter", "values", "only where"], searched),
        "### To type",
        _fence("\n".join(f"{line:{width}}  # {what}" for line, what in typed)),
    ]
    return "\n\n".join(parts)


def describe_trial(trial: FrozenTrial) -> str:
    """Why the trial failed or was pruned, on which worker, and which trials it goes on from; often nothing."""
    return "\n\n".join(_describe_trial(trial))


def _describe_trial(trial: FrozenTrial) -> Iterator[str]:
    reason, attempts = explain_end(trial), trial.user_attrs.get("attempts", ())
    if reason:
        worker = f", on worker {trial.user_attrs['worker']}" if "worker" in trial.user_attrs else ""
        yield f"**{name_state(trial).capitalize()}**{worker}:"
        yield _fence(reason)
    if trial.user_attrs.get("failure", {}).get("retried"):
        yield "It was queued again, with the same parameters."
    if attempts:
        numbers = ", ".join(map(str, attempts))
        yield (
            f"Takes up trial {numbers}, which ended before its time."
            if len(attempts) == 1
            else (f"Takes up the trials {numbers}, which ended before their time.")
        )


def _describe_range(table: Mapping[str, Any]) -> tuple[str, str]:
    """The values of a table of the search, and under which condition they are part of it."""
    condition = ", and ".join(
        f"{name} is {' or '.join(map(str, values))}" for name, values in table.get("when", {}).items()
    )
    if "choice" in table:
        return ", ".join(map(str, table["choice"])), condition
    low, high = table.get("int") or table["float"]
    spread = ", log" if table.get("log") else f", in steps of {table['step']}" if "step" in table else ""
    return f"{low} to {high}{spread}", condition


def _table(heading: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = [heading, ["---"] * len(heading), *([_escape(str(cell)) for cell in row] for row in rows)]
    return ["\n".join(f"| {' | '.join(line)} |" for line in lines)]


def _escape(text: str) -> str:
    """The text so that Markdown shows it as it is: every mark of Markdown and of HTML with a backslash before it."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~$&-])", r"\\\1", text)


def _fence(text: str) -> str:
    """The text as a block of code, within a fence longer than any in it."""
    longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
