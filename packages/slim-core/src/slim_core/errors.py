"""One family of errors: what went wrong, where, and what to do about it.

Class names and codes are those of the recipe protocol, so that callers of the reference tool can keep their
``except`` clauses. The code is part of the message; the exit status of the command is documented in ``docs/cli.md``.
"""

from __future__ import annotations

__all__ = [
    "EnvError",
    "EnvVarError",
    "InvalidDatasetError",
    "InvalidModelError",
    "SchemaValidateError",
    "SecurityError",
    "SlimError",
    "SpecError",
    "UnexpectedError",
    "UnsupportedError",
    "VerificationError",
    "VersionError",
]


class SlimError(Exception):
    """Base of every error that Slim raises on purpose.

    Args:
        what: one sentence that names the problem.
        where: the place: a file and line, a dotted field, a tensor name.
        remedy: what the user can do.
    """

    code: int = 300

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.what = what
        self.where = where
        self.remedy = remedy
        text = f"{where}: {what}" if where else what
        super().__init__(f"{text} ({remedy})" if remedy else text)


class EnvError(SlimError):
    """The environment does not fit: a device or a disk that is not there."""

    code = 100


class VersionError(SlimError):
    """A dependency has the wrong version."""

    code = 101


class EnvVarError(SlimError):
    """An environment variable has an illegal value."""

    code = 102


class InvalidModelError(SlimError):
    """The model folder cannot be read, or its parts do not fit together."""

    code = 201


class InvalidDatasetError(SlimError):
    """Calibration data is missing or malformed."""

    code = 202


class SchemaValidateError(SlimError):
    """An argument or a recipe field has a value that the protocol does not allow."""

    code = 203


class SecurityError(SlimError):
    """A path, a size or an origin is refused."""

    code = 204


class UnsupportedError(SlimError):
    """The combination is understood but cannot be done."""

    code = 301


class SpecError(SlimError):
    """The recipe does not fit this model, or a statistic that it needs was never observed."""

    code = 302


class VerificationError(SlimError):
    """A written checkpoint is not what it claims to be."""

    code = 303


class UnexpectedError(SlimError):
    """Anything else; a bug in Slim."""

    code = 500
