"""Recording the calls of a transformer while its pipeline generates."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from slim_core.checkpoint.background import BackgroundJobs
from slim_core.errors import InvalidDatasetError, SlimError, UnsupportedError
from slim_core.logging import get_logger
from slim_core.sizes import human_size
from slim_sd.captured.files import Piece, RecordWriter, json_values
from slim_sd.captured.plain_values import check_numbers, plain

__all__ = ["Recorder", "forward_parameters"]

_WAITING_BYTES = 128 << 20
_logger = get_logger(__name__)


def forward_parameters(module: nn.Module) -> list[str]:
    """Names of the arguments of a module's forward, in the order of its signature and of a record.

    Those that take any number of arguments (``*args``, ``**kwargs``) are left out.

    Raises:
        UnsupportedError: an argument has no name that a caller could use.
    """
    names: list[str] = []
    for name, parameter in _signature(module).parameters.items():
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise UnsupportedError(
                f"argument {name} of the forward is positional only",
                where=type(module).__name__,
                remedy="calls of this transformer cannot be captured; use a recipe that needs no data",
            )
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            names.append(name)
    return names


def _signature(module: nn.Module) -> inspect.Signature:
    # Of the class: libraries that move modules between devices replace the forward of the instance.
    signature = inspect.signature(type(module).forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


class Recorder:
    """A context in which the calls of a module are recorded to ``calib_data.pth``, which appears at its end.

    A call is recorded before the forward runs: bound to the signature, defaults filled in, tensors copied to the CPU
    in their type. They are written by a thread that may be 128 MiB behind. An exception inside the context, or a call
    that cannot be recorded, leaves no file.

    Args:
        module: a transformer of the pipeline. It must be called, not its ``forward`` directly, as all pipelines do.
        path: the file to write; see :func:`slim_sd.captured.files.records_file`.
        fingerprint: identifies the model that is captured.
        settings: of the generation (prompt, size, steps, seed and so on): JSON values, or what ``str`` makes of them.

    Raises:
        SecurityError, EnvError: the file cannot be written.
        UnsupportedError: an argument is no tensor, number, text or plain container of them.
        InvalidDatasetError: the module was never called, or with NaN or infinities.
    """

    def __init__(self, module: nn.Module, path: Path, *, fingerprint: str, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.parameters = forward_parameters(module)
        self._module = module
        self._signature = _signature(module)
        self._about = {
            "class_name": type(module).__name__,
            "parameters": self.parameters,
            "fingerprint": fingerprint,
            "settings": json_values(settings),
        }
        self._records: list[list[Any]] = []
        self._writer = RecordWriter(path)
        self._stack = ExitStack()
        self._jobs: BackgroundJobs | None = None

    def __len__(self) -> int:
        """Calls recorded so far."""
        return len(self._records)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self._writer)
            self._jobs = BackgroundJobs(1, _WAITING_BYTES)
            stack.callback(self._jobs.stop)
            # After all other hooks, so that what is recorded is what the forward gets.
            handle = self._module.register_forward_pre_hook(self._record, with_kwargs=True)
            stack.callback(handle.remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            if error is None:
                self._finish()

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._raise_failure()
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError:
            return  # the forward is about to refuse it too
        bound.apply_defaults()
        number = len(self._records)
        for name in bound.arguments.keys() - set(self.parameters):
            if bound.arguments[name]:
                raise UnsupportedError(
                    f"call {number} passes arguments that the forward does not name: {bound.arguments[name]!r:.200}",
                    where=f"{type(module).__name__}.forward",
                    remedy="calls of this pipeline cannot be captured; use a recipe that needs no data",
                )
        self._records.append(
            [
                plain(
                    bound.arguments[name],
                    f"{type(module).__name__}.forward, call {number}, argument {name}",
                    lambda tensor, where, name=name: self._keep(tensor, where, name),
                )
                for name in self.parameters
            ]
        )

    def _keep(self, tensor: Tensor, where: str, parameter: str) -> Piece:
        """Copy a tensor now, and have it written later."""
        with torch.no_grad():
            copy = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format).contiguous()
        piece = Piece(copy.dtype, tuple(copy.shape))

        def write() -> None:
            check_numbers(copy, where, parameter, "the pipeline itself goes wrong: try another dtype, prompt or seed")
            self._writer.add(piece, copy)

        cast("BackgroundJobs", self._jobs).submit(write, copy.nbytes)
        return piece

    def _raise_failure(self) -> None:
        failure = cast("BackgroundJobs", self._jobs).error
        if isinstance(failure, SlimError):
            raise failure
        if failure is not None:
            raise RuntimeError("recording a call failed") from failure

    def _finish(self) -> None:
        cast("BackgroundJobs", self._jobs).drain()
        self._raise_failure()
        if not self._records:
            raise InvalidDatasetError(
                "the pipeline never called this transformer, so there are no calibration inputs for it",
                where=type(self._module).__name__,
                remedy="raise sample_steps so that every transformer of the pipeline gets a step",
            )
        self._writer.finish(self._records, self._about)
        _logger.info(
            "captured %d calls of %s (%s of distinct tensors) in %s",
            len(self._records),
            type(self._module).__name__,
            human_size(self._writer.written),
            self.path,
        )
