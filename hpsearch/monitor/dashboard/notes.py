"""The dashboard's notes about a study and its trials, in Markdown."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from optuna.trial import FrozenTrial

from hpsearch.config.definition import N_TRAINING_IMAGES, StudyDefinition
from hpsearch.config.urls import show_url
from hpsearch.search.trials import explain_end, name_state

_COMMANDS = {
    "run": "start or resume the search",
    "status --watch": "watch the search in a terminal",
    "stop": "stop all workers",
    "confirm": "retrain the best trials with new seeds: was it luck?",
    "export": "retrain, test and save the best model",
}


def describe_study(definition: StudyDefinition, budget: Mapping[str, Any], arguments: str) -> str:
    """Return the note of a study: settings, search space and commands; `arguments` follow the name of each command."""
    data, tables = definition.data, definition.to_tables()
    n_train = data.train or N_TRAINING_IMAGES[data.name] - data.validation
    limits = {"minutes": "{} minutes", "target": "an accuracy of {}", "failures": "{} failures"}
    ends = [text.format(budget[key]) for key, text in limits.items() if key in budget]
    epochs = f"{definition.budget.epochs} epochs"
    about = {
        "network": definition.network.kind,
        "data": f"{data.name}: {n_train:,} training and {data.validation:,} validation images",
        "budget": f"{budget['trials']} trials of {epochs}; also ends after {' or '.join(ends)}",
        "sampler / pruner": f"{definition.sampler.kind}, {definition.pruner.kind}",
        "seed": f"{definition.study.seed} (data split: {data.split_seed})",
        "database": show_url(definition.study.storage),
        "fixed": ", ".join(f"{name} {value}" for name, value in tables["fixed"].items()) or "nothing",
    }
    searched = [[name, *_describe_range(table)] for name, table in tables["search"].items()]
    commands = [(f"hpsearch {command} {arguments}", what) for command, what in _COMMANDS.items()]
    width = max(len(line) for line, _ in commands)
    parts = [
        f"## {_escape(definition.study.name)}",
        f"The value of a trial is its **validation accuracy** after {epochs} (for a pruned trial: when it was pruned). "
        "The search never uses the test set; `hpsearch export` evaluates on it once.",
        *_table(["", ""], list(about.items())),
        "### Search space",
        *_table(["hyperparameter", "range", "condition"], searched),
        "### Commands",
        _fence("\n".join(f"{line:{width}}  # {what}" for line, what in commands)),
    ]
    return "\n\n".join(parts)


def describe_trial(trial: FrozenTrial) -> str:
    """Return the note of a trial: why it failed or was pruned, and which trials it resumes. Often empty."""
    return "\n\n".join(_describe_trial(trial))


def _describe_trial(trial: FrozenTrial) -> Iterator[str]:
    reason, attempts = explain_end(trial), trial.user_attrs.get("attempts", ())
    if reason:
        worker = f", on worker {trial.user_attrs['worker']}" if "worker" in trial.user_attrs else ""
        yield f"**{name_state(trial).capitalize()}**{worker}:"
        yield _fence(reason)
    if trial.user_attrs.get("failure", {}).get("retried"):
        yield "Re-queued with the same hyperparameters."
    if attempts:
        numbers, several = ", ".join(map(str, attempts)), len(attempts) > 1
        yield f"Resumes trial{'s' * several} {numbers}, which {'were' if several else 'was'} interrupted."


def _describe_range(table: Mapping[str, Any]) -> tuple[str, str]:
    """Return the range of a hyperparameter and its condition, as text."""
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
    """Return the text with all special characters of Markdown and HTML escaped by a backslash."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~$&-])", r"\\\1", text)


def _fence(text: str) -> str:
    """Return the text as a code block; its fence is longer than any run of backticks in the text."""
    longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
