import pytest
import transformers

from benchmarks.architectures import check
from benchmarks.tiny_models import ARCHITECTURES


@pytest.fixture(autouse=True)
def quiet_transformers():
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(level)


@pytest.mark.filterwarnings("ignore")  # transformers' own, about tiny models
@pytest.mark.parametrize("saved", ["old", "new"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_merge_computes_what_the_merge_of_state_dicts_computes(name, saved, tmp_path):
    """The base model has the names of one version of transformers, and the tasks those of another."""
    row = check(name, saved, tmp_path)
    assert row.error == ""
    assert row.difference <= 1e-6
