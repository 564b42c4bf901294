"""The journal of a run: which units are on disk, and what is to be told of them. Of several ranks the first keeps
it."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from slim_core.checkpoint.staging import Staging
from slim_core.checkpoint.writer import ShardedWriter
from slim_core.logging import get_logger
from slim_core.ranks.group import Ranks

__all__ = ["Ledger"]

_POLL = 0.1
_logger = get_logger(__name__)
Note = dict[str, Any]


class _Warnings(logging.Handler):
    """Remembers the warnings of this process."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


class Ledger:
    """Takes notes of units and puts them down once all bytes of a unit have been handed to the file system.

    With several ranks a unit is done when all of them say so. They tell the first one, which looks for it on a thread
    of its own, so that nobody waits for anybody.

    Args:
        chief: by unit, the rank whose account of the cost counts.
    """

    def __init__(
        self, staging: Staging, writer: ShardedWriter, ranks: Ranks, units: Sequence[str], chief: Callable[[str], int]
    ) -> None:
        self._staging, self._writer, self._ranks = staging, writer, ranks
        self._chief = chief
        self._count = 0
        self._due = [unit for unit in units if unit not in staging.finished]
        self.notes: dict[str, Note] = {}
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._warnings = _Warnings()
        if ranks.size > 1:
            logging.getLogger("slim").addHandler(self._warnings)
            if ranks.first:
                self._thread = threading.Thread(target=self._collect, name="slim-ledger", daemon=True)
                self._thread.start()

    def note(self, unit: str, note: Note) -> None:
        """This rank has done its part of a unit. Waits for the last bytes of it, which are few, as most were written
        while others were made: so a run that is killed has lost no more than the unit at work."""
        if self._ranks.size == 1:
            self._writer.wait_for(self._writer.after_writing(lambda: self._staging.record(unit, note)))
            return
        told, self._warnings.texts = self._warnings.texts, []
        text = json.dumps({"unit": unit, "note": note, "warnings": told})
        key, self._count = f"note/{self._ranks.rank}/{self._count}", self._count + 1
        self._writer.wait_for(self._writer.after_writing(lambda: self._ranks.tell(key, text)))

    def _collect(self) -> None:
        try:
            self._gather_notes()
        except BaseException as error:  # noqa: BLE001 - whatever it is, it belongs to the thread that waits
            self._error = error

    def _gather_notes(self) -> None:
        counts = [0] * self._ranks.size
        coming: dict[str, dict[int, Note]] = {}
        said: set[str] = set()
        while len(self.notes) < len(self._due) and not self._stop.is_set():
            found = False
            for rank in range(self._ranks.size):
                text = self._ranks.told(f"note/{rank}/{counts[rank]}")
                if text is None:
                    continue
                found, counts[rank] = True, counts[rank] + 1
                given = json.loads(text)
                said.update(given["warnings"] if not rank else ())
                unit = given["unit"]
                coming.setdefault(unit, {})[rank] = given
                if len(coming[unit]) == self._ranks.size:
                    self._put_down(unit, coming.pop(unit), said)
            if not found:
                self._stop.wait(_POLL)

    def _put_down(self, unit: str, given: Mapping[int, Note], said: set[str]) -> None:
        for rank in range(1, self._ranks.size):
            for text in given[rank]["warnings"]:
                if text not in said:
                    said.add(text)
                    _logger.warning("%s", text)
        notes = [given[rank]["note"] for rank in range(self._ranks.size)]
        whole: Note = {"cost": notes[self._chief(unit)]["cost"]}
        for key in notes[0]:
            if key != "cost":
                whole[key] = [record for note in notes for record in note[key]]
        self._staging.record(unit, whole)
        self.notes[unit] = whole

    def complete(self) -> None:
        """Wait until every rank has said of every unit that it is done; only on the first.

        Raises:
            LostRankError: one of them never will.
        """
        while self._thread is not None and self._thread.is_alive():
            self._ranks.tick("the end")
            time.sleep(_POLL / 2)
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Nothing more will be noted."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        logging.getLogger("slim").removeHandler(self._warnings)
