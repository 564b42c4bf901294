"""``slim verify``: an independent check of a quantized folder."""

from slim_core.evaluation.verify.folder import Opener, Parts, verify_folder
from slim_core.evaluation.verify.original import open_original, recipe_of_run
from slim_core.evaluation.verify.result import Verification

__all__ = ["Opener", "Parts", "Verification", "open_original", "recipe_of_run", "verify_folder"]
