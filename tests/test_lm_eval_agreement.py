"""Answers and likelihoods are those of lm-eval, example by example.

In float64, where the two differ by nothing but the order of sums. Where lm-eval is not installed:
`python -m benchmarks.lm_eval_agreement` has stored what it found.
"""

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'hub-magmax[lm-eval]'")

from benchmarks.lm_eval_agreement import CASES, compared


@pytest.mark.filterwarnings("ignore")  # those of lm-eval and what it imports
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_example_scores_as_in_lm_eval(case, tmp_path):
    ours, theirs = compared(case, tmp_path)
    assert len(ours) == case.num_examples
    assert ours == pytest.approx(theirs, rel=1e-12, abs=1e-12)
