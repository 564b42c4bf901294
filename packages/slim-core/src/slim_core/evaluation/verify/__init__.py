"""``slim verify``: an independent check of an ascendv1 folder."""

from slim_core.evaluation.verify.folder import Verification, verify_folder

__all__ = ["Verification", "verify_folder"]
