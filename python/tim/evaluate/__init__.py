"""Quality of samples against the number of steps.

`classifier_quality` measures small labelled pictures in the features of a classifier that is
trained on the spot.
"""

from __future__ import annotations

from tim.evaluate.classifier import Quality, classifier_quality

__all__ = ["Quality", "classifier_quality"]
