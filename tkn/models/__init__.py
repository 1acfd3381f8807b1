"""Networks by name: the paper's, torchvision's, timm's and one's own. Plain torch, no training code."""

from tkn.models.architecture import Architecture
from tkn.models.build import MODEL_NAMES, build_model, check_model_options
from tkn.models.paper import BASE

__all__ = ["BASE", "MODEL_NAMES", "Architecture", "build_model", "check_model_options"]
