import pytest
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor, zeros

from tests import typechecks


def made(kind, default=None):
    @jaxtyped(typechecker=typechecks.checked)
    def same(value: kind = default) -> kind:
        return value

    return same


def test_functions_of_one_code_are_checked_by_their_own_annotations():
    assert (made(int)(1), made(str)("a"), made(int, 2)(), made(int, 3)()) == (1, "a", 2, 3)
    for kind, value in ((int, "a"), (str, 1), (Float[Tensor, "2"], zeros(3))):
        with pytest.raises(TypeCheckError):
            made(kind)(value)


def test_functions_in_functions_are_checked_by_what_was_compiled_once(monkeypatch):
    made(Float[Tensor, "rows"])
    monkeypatch.setattr(typechecks, "beartype", None)
    assert made(Float[Tensor, "rows"])(zeros(3)).shape == (3,)


def test_the_package_is_checked():
    from hub_magmax.methods.selection import quotas

    with pytest.raises(TypeCheckError):
        quotas("half", 2)
