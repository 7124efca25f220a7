"""How scores are written, by hand."""

import pytest

from hub_magmax.reporting.score_formats import Unit


@pytest.mark.parametrize(
    ("is_share", "number", "value", "change"),
    [
        (True, 0.875, "87.5", "+87.5"),
        (True, -0.051, "−5.1", "−5.1"),
        (True, -0.0001, "0.0", "+0.0"),
        (False, -2.34567, "−2.346", "−2.346"),
        (False, 12.0, "12", "+12"),
        (False, 12345.6, "1.235e+04", "+1.235e+04"),
        (False, -0.0, "0", "+0"),
    ],
)
def test_shares_are_per_cent_and_other_scores_themselves(is_share, number, value, change):
    unit = Unit(is_share)
    assert (unit.value(number), unit.change(number)) == (value, change)


def test_only_shares_have_per_cent_and_points():
    assert (Unit(False).sign, Unit(False).difference_name, Unit(False).words) == (
        "",
        "",
        " (higher is better)",
    )
