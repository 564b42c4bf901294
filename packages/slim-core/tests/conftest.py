"""Settings for all tests of the package."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("slim", deadline=None)
settings.load_profile("slim")
