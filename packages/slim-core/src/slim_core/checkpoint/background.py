"""Jobs on a few background threads, behind a bound on the bytes they hold."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from slim_core.phases import Busy

__all__ = ["BackgroundJobs"]

Job = Callable[[], None]


class BackgroundJobs:
    """Runs jobs in the order given, several at a time; a *barrier* waits for all jobs before it.

    Args:
        threads: how many jobs run at a time.
        limit: bytes that waiting and running jobs may hold together; a larger single job passes alone.
        waiting: makes a context to be in while a call waits for the jobs.

    After a job has failed, ``error`` holds what it raised and the jobs behind it are dropped. ``busy`` knows for how
    long any job was running.
    """

    def __init__(
        self, threads: int, limit: int, waiting: Callable[[], AbstractContextManager[object]] = nullcontext
    ) -> None:
        self._limit = limit
        self._waiting = waiting
        self._state = threading.Condition()
        self._queue: deque[tuple[int, Job, int, bool]] = deque()
        self._running: set[int] = set()
        self._submitted = 0
        self._stopping = False
        self.held_bytes = 0
        self.busy = Busy()
        self.error: BaseException | None = None
        self._threads = [threading.Thread(target=self._work, name="slim-writer", daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job, nbytes: int = 0, *, barrier: bool = False) -> int:
        """Add a job, and return its number; waits while too many bytes are held. Dropped if a job has failed."""
        with self._state:
            if not self._has_room(nbytes):
                with self._waiting():
                    self._state.wait_for(lambda: self._has_room(nbytes))
            number = self._submitted
            if self.error is not None:
                return number
            self.held_bytes += nbytes
            self._queue.append((number, job, nbytes, barrier))
            self._submitted += 1
            self._state.notify_all()
            return number

    def _has_room(self, nbytes: int) -> bool:
        return self.error is not None or not self.held_bytes or self.held_bytes + nbytes <= self._limit

    def _work(self) -> None:
        while True:
            with self._state:
                self._state.wait_for(lambda: self._queue or self._stopping)
                if not self._queue:
                    return
                number, job, nbytes, barrier = self._queue.popleft()
                self._running.add(number)
                if barrier:
                    self._state.wait_for(lambda own=number: min(self._running) == own)
                dropped = self.error is not None
            try:
                if not dropped:
                    with self.busy.within():
                        job()
            except BaseException as error:  # noqa: BLE001 - whatever it is, it belongs to the thread that waits
                self.error = self.error or error
            del job
            with self._state:
                self._running.discard(number)
                self.held_bytes -= nbytes
                self._state.notify_all()

    def await_job(self, number: int) -> None:
        """Wait until a job and all before it are done, or one has failed."""
        with self._waiting(), self._state:
            self._state.wait_for(lambda: self.error is not None or number < min(self._pending(), default=number + 1))

    def _pending(self) -> list[int]:
        return [*self._running, *(number for number, *_ in self._queue)]

    def drain(self) -> None:
        """Wait until nothing waits or runs."""
        with self._waiting(), self._state:
            self._state.wait_for(lambda: not self._queue and not self._running)

    def stop(self) -> None:
        """Finish what waits and end the threads."""
        with self._state:
            self._stopping = True
            self._state.notify_all()
        for thread in self._threads:
            thread.join()
