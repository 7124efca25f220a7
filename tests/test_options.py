from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from hub_magmax.options import PerTask, allowed_values


class Own:
    """A type of a plug-in, which no schema describes."""


@pytest.mark.parametrize(
    ("annotation", "told"),
    [
        (float, "a number"),
        (bool, "true or false"),
        (str, "a text"),
        (list[int], "a list"),
        (dict[str, float], "a mapping"),
        (Any, "any value"),
        (Own, "Own"),
        (Annotated[float, Field(ge=0, le=1)], "a number from 0 to 1"),
        (Annotated[float, Field(gt=0, le=1)], "a number above 0 and at most 1"),
        (Annotated[float, Field(ge=0)], "a number of at least 0"),
        (Annotated[int, Field(ge=1, lt=1000)], "a whole number of at least 1 and below 1000"),
        (Literal["tensor", "row", "column"], "tensor, row or column"),
        (Annotated[float, Field(gt=0)] | None, "a number above 0"),
        (Annotated[float, Field(gt=0)] | Literal["adaptive"], "a number above 0 or adaptive"),
        (
            Annotated[tuple[float, ...], PerTask(Annotated[float, Field(gt=0)])],
            "a number above 0, or one for each task by its name",
        ),
    ],
)
def test_values_of_an_option_are_told_in_words(annotation, told):
    assert allowed_values(annotation) == told
