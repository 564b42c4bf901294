"""The process of a rank that Slim starts itself: ``python -m slim_core.rank_process``, told what to do on its standard
input."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import traceback
from importlib import import_module
from pathlib import Path

from slim_core.errors import SlimError
from slim_core.progress import SilentProgress
from slim_core.ranks.launch import REPORT_VARIABLE

__all__ = ["main"]


def main() -> int:
    """Carry out the job. A failure is left in a file for rank 0, which tells the user."""
    logging.getLogger("slim").addHandler(logging.NullHandler())  # what is worth telling goes to rank 0
    logging.getLogger("slim").propagate = False
    given = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, args=(sys.stdin.fileno(),), daemon=True).start()
    module, _, function = given["function"].partition(":")
    try:
        job = getattr(import_module(module), function)(**given["arguments"])
        job.run(SilentProgress())
    except SlimError as error:
        if type(error).__name__ != "LostRankError":  # that is what happened to others
            _leave(type(error).__name__, error.what, error.where, error.remedy)
        return 1
    except Exception as error:  # noqa: BLE001 - whatever it is, rank 0 must know
        _leave("UnexpectedError", f"{error!r}\n{traceback.format_exc()}", None, None)
        return 1
    return 0


def _end_with_parent(pipe: int) -> None:
    """The process that started this one is gone once its end of the pipe is."""
    while os.read(pipe, 1):
        pass
    os._exit(1)


def _leave(kind: str, what: str, where: str | None, remedy: str | None) -> None:
    path = Path(os.environ[REPORT_VARIABLE])
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"type": kind, "what": what, "where": where, "remedy": remedy}), "utf-8")
    os.replace(partial, path)


if __name__ == "__main__":
    sys.exit(main())
