"""Methods that depend on lengths and angles: of models, or of task vectors, tensor by tensor."""

from typing import Literal

#: What has one vector: a whole tensor, each of its rows (one index of the first axis), or each of its columns
#: (everything along the first axis). A tensor without a second axis is one vector.
Each = Literal["tensor", "row", "column"]
#: What vectors are of: whole models, or their differences from the base model.
Of = Literal["models", "task_vectors"]
#: Between a vector and one of zeros, which has no direction: the straight line, or an arc of 90 degrees.
Zeros = Literal["line", "right_angle"]
