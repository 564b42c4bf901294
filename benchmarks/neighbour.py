"""A run of the shipped model beside a process that never sleeps, and alone, for settings of idle threads.

    python benchmarks/neighbour.py [--rounds 2]

Every run has as many threads as there are cores. One that takes more than four minutes is ended.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
LONGEST = 240
SETTINGS: dict[str, dict[str, str]] = {
    "as slim_core sets it": {},
    "GOMP_SPINCOUNT=300000, the library's own": {"GOMP_SPINCOUNT": "300000"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
}


@contextmanager
def neighbour(there: bool) -> Generator[None]:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if there else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def seconds(settings: dict[str, str], out: Path) -> str:
    """What the report says the run took."""
    names = ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in names} | settings
    command = [sys.executable, "-m", "slim_llm", "quant", "--model_path", str(ROOT / "examples" / "tiny-qwen3")]
    command += ["--config_path", str(ROOT / "examples" / "w8a8-static.yaml"), "--model_type", "tiny-qwen3"]
    command += ["--save_path", str(out), "--device", "cpu", "--overwrite"]
    try:
        subprocess.run(command, env=environment, check=True, timeout=LONGEST, capture_output=True)
    except subprocess.TimeoutExpired:
        return f"over {LONGEST}"
    return f"{json.loads((out / 'report.json').read_text())['seconds']:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        for name, settings in SETTINGS.items():
            told: list[str] = []
            for busy in (False, True):
                with neighbour(busy):
                    told.append(", ".join(seconds(settings, Path(folder) / "out") for _ in range(rounds)))
            print(f"| {name} | {' | '.join(told)} |", flush=True)


if __name__ == "__main__":
    main()
