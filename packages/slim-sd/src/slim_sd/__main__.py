"""``python -m slim_sd``: quant, eval, practices and recipe without the slim-cli package."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from slim_core.plain_command import main as run

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and return the exit status; the same as that of ``slim``."""
    return run("python -m slim_sd", "Quantize diffusion models.", "slim-sd", arguments)


if __name__ == "__main__":
    sys.exit(main())
