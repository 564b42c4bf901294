"""Work that is shared out over threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from slim_core.quantization.row_blocks import for_each_block, side_by_side


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_jobs_give_their_results_in_order(threads: int) -> None:
    def job(number: int) -> Callable[[], tuple[int, int]]:
        def work() -> tuple[int, int]:
            time.sleep(0.002 * (7 - number))
            return number, torch.get_num_threads()

        return work

    assert list(side_by_side(map(job, range(7)))) == [(number, 1) for number in range(7)]


def test_few_jobs_run_ahead_of_their_results(threads: int) -> None:
    """What jobs give is held until it is taken, so they must not all run at once."""
    begun: list[int] = []
    lock = threading.Lock()

    def jobs() -> Iterator[Callable[[], int]]:
        for number in range(20):
            with lock:
                begun.append(number)
            yield lambda number=number: number

    for number in side_by_side(jobs()):
        assert len(begun) <= number + threads + 1


def test_an_error_comes_where_its_result_would(threads: int) -> None:
    def failing() -> int:
        raise ValueError("third")

    made = side_by_side([lambda: 1, lambda: 2, failing, lambda: 4])
    assert [next(made), next(made)] == [1, 2]
    with pytest.raises(ValueError, match="third"):
        next(made)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_blocks_are_computed_by_one_thread_each(threads: int, count: int) -> None:
    assert for_each_block(lambda start: (start, torch.get_num_threads()), range(0, 10 * count, 10)) == [
        (start, 1) for start in range(0, 10 * count, 10)
    ]
