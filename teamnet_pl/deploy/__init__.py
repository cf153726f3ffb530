"""A trained net at work: a budget at run time decides its depth."""

from teamnet_pl.deploy.images import Preprocessing
from teamnet_pl.deploy.predictor import Prediction, Predictor
from teamnet_pl.deploy.profile import Profile

__all__ = ["Prediction", "Predictor", "Preprocessing", "Profile"]
