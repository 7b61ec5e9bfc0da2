"""Quality of samples against the number of steps.

`classifier_quality` measures small labelled pictures in the features of a classifier that is
trained on the spot; `image_quality` measures any pictures in the features of Inception (or another
network) against reference images or statistics.
"""

from __future__ import annotations

from tim.evaluate.classifier import Quality, classifier_quality
from tim.evaluate.images import ImageQuality, image_quality

__all__ = ["ImageQuality", "Quality", "classifier_quality", "image_quality"]
