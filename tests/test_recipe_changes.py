from pathlib import Path

import pytest
import yaml

from hub_magmax.errors import RecipeError
from hub_magmax.recipe.changes import parse_preference, parse_setting
from hub_magmax.recipe.loading import RecipeText, parse_text
from hub_magmax.recipe.schema import Recipe
from tests.families import recipe_values


def changed(*settings: str, preference: str | None = None, **values: object) -> Recipe:
    changes = [parse_setting(text) for text in settings]
    changes += [parse_preference(preference)] if preference is not None else []
    values |= {"preference": values.pop("preference_")} if "preference_" in values else {}
    text = yaml.safe_dump(recipe_values(**values), sort_keys=False)
    return parse_text(RecipeText(text, "mix.yaml", Path()), changes)


def refusal(*settings: str, **options: object) -> str:
    with pytest.raises(RecipeError) as caught:
        changed(*settings, **options)
    return str(caught.value)


def test_a_value_takes_the_place_of_the_recipes():
    recipe = changed("method.scaling=0.4", method={"name": "ties", "density": 0.3})
    assert (recipe.method.name, recipe.method.scaling) == ("ties", 0.4)
    assert recipe.method.options == {"density": 0.3}


def test_options_of_a_bare_name_stay_with_it():
    assert changed("method.density=0.3", method="ties").method.name == "ties"


def test_a_key_that_is_not_there_is_made():
    assert changed("output.push_to_hub=me/x").output.push_to_hub == "me/x"


def test_later_ones_count():
    assert changed("seed=1", "seed=2").seed == 2


@pytest.mark.parametrize("key", ["tasks.b.model", "tasks.1.model"])
def test_items_are_called_by_name_or_by_number(key):
    assert [task.model for task in changed(f"{key}=me/x@v1").tasks] == ["./a", "me/x@v1", "./c"]


def test_a_name_with_a_point_in_it_is_one_name():
    tasks = [{"name": "v1.5", "model": "./a"}, {"name": "v2", "model": "./b"}]
    recipe = changed("tasks.v1.5.model=./x", "preference.weights={v2: 1}", tasks=tasks)
    assert recipe.tasks[0].model == "./x"
    recipe = changed("preference.weights.v2=0.25", "preference.weights.v1.5=0.75", tasks=tasks)
    assert recipe.preference.weights == {"v2": 0.25, "v1.5": 0.75}


def test_text_is_read_as_it_is_written():
    assert changed("tasks.a.name=no").task_names[0] == "no"
    assert changed("output.path=2024-01-01").output.path == "2024-01-01"


def test_a_value_may_be_a_list_or_nothing():
    recipe = changed("tensors=[{match: 'a.*', take: a}]", "preference=null", preference_={})
    assert recipe.tensors[0].match == "a.*"
    assert recipe.preference is None


def test_another_kind_of_preference_takes_the_place_of_the_first():
    weights = {"weights": {"a": 0.5, "b": 0.5}}
    assert changed("preference.geometric.ratio=0.5", preference_=weights).preference.kind == "geometric"


def test_a_preference_is_written_as_shares_or_as_uniform():
    assert changed(preference="a=.7, b=.3").preference.weights == {"a": 0.7, "b": 0.3}
    assert changed(preference="uniform", preference_={"geometric": {"ratio": 2}}).preference is None


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        (
            "method.densty=0.3",
            "--set method.densty=0.3, method.densty: ties has no option 'densty'; did you mean",
        ),
        ("outptu.path=x", "--set outptu.path=x, outptu: unknown key 'outptu'; did you mean 'output'?"),
        ("seed=-1", "--set seed=-1, seed: -1 should be at least 0"),
        ("method.scaling", "--set method.scaling: this is no key with a value. Expected key.path=value"),
        ("tasks.bb.model=x", "tasks has no task 'bb'. Expected a, b, c, or its number, from 0 to 2. Did you"),
        ("tasks.3.model=x", "tasks has no task '3'"),
        ("seed.x=1", "seed is 0, which has no keys"),
        ("seed=[", "--set seed=[, line 1, column 2: not valid YAML"),
        ("preference.weigths.a=1", "unknown key 'weigths'; did you mean 'weights'?"),
    ],
)
def test_an_error_names_the_option_and_the_key(setting, text):
    assert text in refusal(setting, method="ties", seed=0)


def test_an_error_elsewhere_keeps_its_line():
    text = refusal("method.scaling=0.4", seed=-1)
    assert text.startswith("mix.yaml, line 10, column 1, seed: -1 should be at least 0")


@pytest.mark.parametrize(
    ("preference", "text"),
    [
        ("a", "--preference a: 'a' is no share"),
        ("a=.5,a=.5", "the task 'a' appears twice"),
        ("a=.5,b=x", "--preference a=.5,b=x, preference.weights.b: 'x' should be a number"),
        ("a=.5,d=.5", "there is no task 'd'"),
        ("a=3,b=1", "in the same proportions: {a: 0.75, b: 0.25}"),
        ("unifrom", "or uniform"),
    ],
)
def test_a_preference_that_is_none_is_refused(preference, text):
    assert text in refusal(preference=preference)
