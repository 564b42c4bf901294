"""How long idle threads spin, which is settled before torch is loaded."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_CODE = "import os, slim_core, sys; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "None")],
    ids=["by itself", "as asked", "as the policy says"],
)
def test_idle_threads_sleep_soon_unless_the_user_says_otherwise(given: dict[str, str], spins: str) -> None:
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in names} | given
    told = subprocess.run([sys.executable, "-c", _CODE], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.split() == [spins, "False"]
