from .controller import DepthController
from .predictor import NonFiniteError, Prediction, Predictor
from .preprocessing import Images, Preprocessing
from .profile import Profile, ProfileRow

__all__ = [
    "DepthController",
    "Images",
    "NonFiniteError",
    "Prediction",
    "Predictor",
    "Preprocessing",
    "Profile",
    "ProfileRow",
]
