"""Each fault of `scripts/chaos` in a short form: the promises of storage and workers hold when it is injected."""

import random
from functools import partial
from pathlib import Path

import pytest

from .chaos import FAULTS, Fault
from .faults import Impossible, restart_postgresql


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
@pytest.mark.filterwarnings("ignore:Heartbeat of storage is supposed to be used with Study.optimize")
def test_nothing_is_lost_by(fault: Fault, tmp_path: Path) -> None:
    inject = partial(restart_postgresql, down=5) if fault.name == "postgresql" else fault.inject
    try:
        inject(tmp_path, fault.short, random.Random(0))
    except Impossible as reason:
        pytest.skip(f"{fault.name}: {reason}")
