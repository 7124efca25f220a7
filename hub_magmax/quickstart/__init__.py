"""The digits benchmark: a base model and the checkpoints of tasks learned one after the other.

Everything comes from scikit-learn's 1,797 handwritten digits of 8×8 pixels, so any machine can make it.
A small vision transformer learns which way up a digit is, and a little about which digit it is: the
base model. Then it learns the tasks, a few digits each, every task from the checkpoint before it, with
a frozen orthonormal head over all ten classes that all checkpoints share.

The same settings give the same bytes, whatever the number of threads and however often it was
interrupted; another processor or another version of PyTorch may round differently.
"""

from hub_magmax.quickstart.family import DigitsFamily, make_family
from hub_magmax.quickstart.settings import Settings, Training

__all__ = ["DigitsFamily", "Settings", "Training", "make_family"]
