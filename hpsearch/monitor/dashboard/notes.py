"""The dashboard's notes about a study and its trials, in Markdown."""

import re
from collections.abc import Mapping
from typing import Any

from optuna.trial import FrozenTrial

from hpsearch.config.definition import StudyDefinition, evolve
from hpsearch.monitor.trials import describe_interruption
from hpsearch.search.trials import explain_end, name_state

_COMMANDS = {
    "run": "start or resume the search",
    "status --watch": "watch the search in a terminal",
    "stop": "stop all workers",
    "confirm": "retrain the best trials with new seeds: was it luck?",
    "export": "retrain, test and save the best model",
}


def describe_study(definition: StudyDefinition, budget: Mapping[str, Any], arguments: str) -> str:
    """Return the note of a study: the commands, and the study file with all defaults and the `budget` of today.

    `arguments` follow the name of each command.
    """
    today = evolve(definition, "budget", **budget)
    commands = [(f"hpsearch {command} {arguments}", what) for command, what in _COMMANDS.items()]
    width = max(len(line) for line, _ in commands)
    parts = [
        f"The value of a trial is its **validation {today.study.metric_title}** after {today.budget.epochs} epochs "
        "(for a pruned trial: when it was pruned). The search never uses the test set; `hpsearch export` evaluates on "
        "it once.",
        _fence("\n".join(f"{line:{width}}  # {what}" for line, what in commands)),
        "What is searched, as a study file:",
        _fence(today.to_toml().strip()),
    ]
    return "\n\n".join(parts)


def describe_trial(trial: FrozenTrial) -> str:
    """Return the note of a trial: why it failed or was pruned, and what interrupted it. Often empty."""
    parts, reason = [], explain_end(trial)
    if trial.state.is_finished() and reason:
        worker = f", on worker {trial.user_attrs['worker']}" if "worker" in trial.user_attrs else ""
        parts += [f"**{name_state(trial).capitalize()}**{worker}:", _fence(reason)]
    if interruptions := trial.user_attrs.get("interruptions"):
        told = _fence("\n".join(describe_interruption(each) for each in interruptions))
        parts += ["**Interrupted**; its next attempt continues from the last checkpoint:", told]
    return "\n\n".join(parts)


def _fence(text: str) -> str:
    """Return the text as a code block; its fence is longer than any run of backticks in the text."""
    longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
