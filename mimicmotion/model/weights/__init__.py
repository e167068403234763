"""Weights from anywhere into the model, and into every layout that people use: strictly, both ways.

`files`: what a file is, and its tensors; `names`: its names -> the model's; `reading`: which files make up a set of
weights; `hub`: where they lie on a hub; `loading`: held against the model and copied; `writing`: the layouts.
"""

from mimicmotion.model.weights.files import WeightsError
from mimicmotion.model.weights.loading import KeyReport, compare, load
from mimicmotion.model.weights.reading import Weights, read

__all__ = ["KeyReport", "Weights", "WeightsError", "compare", "load", "read"]
