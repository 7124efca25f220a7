"""Claims, tests over seeds, scores by task and the pages of the experiments: oracles and cases by hand."""

import json
import math
import re
import shutil

import numpy as np
import pytest

from benchmarks.continual import elsewhere, measuring, pages, ranked, verdicts
from benchmarks.continual.by_task import parts_of, sums_by_task
from benchmarks.continual.claims import BEST, CLAIMS, CONFIRMED_ON, LABELS, LEVEL
from benchmarks.continual.details import details
from benchmarks.continual.protocol import Protocol, Target, draw_targets
from benchmarks.continual.questions import QUESTIONS, answers
from benchmarks.continual.ranked import FAMILIES, claims_table, family_of, ranked_table
from benchmarks.continual.rows import accuracies, by_seed, is_measured, preference_of, worst
from benchmarks.continual.significance import effect_interval, holm, paired, t_test_p, wilcoxon_p
from benchmarks.continual.tables import make_tables
from hub_magmax.analysis.candidates import Candidate
from hub_magmax.methods import method_names
from hub_magmax.recipe.matching import locked_method

OURS, AVERAGE, REGMEAN = "tunable_magmax algorithm-1", "average", "regmean"


def test_p_values_by_hand():
    # Differences 1, 2, 3: mean 2, standard error 1/sqrt(3), two degrees of freedom.
    t = 2 * 3**0.5
    assert t_test_p([1.0, 2.0, 3.0]) == pytest.approx(1 - t / (2 + t * t) ** 0.5)
    assert t_test_p([1.0]) is None
    assert t_test_p([0.0, 0.0]) == 1.0
    assert t_test_p([1.0, 1.0]) is None
    # Ranks 1 to 8, all positive: mean 18, variance 8·9·17/24 = 51.
    assert wilcoxon_p(np.arange(1.0, 9.0)) == pytest.approx(math.erfc(18 / 51**0.5 / 2**0.5))
    assert wilcoxon_p(np.zeros(4)) == 1.0


def test_an_interval_and_an_effect_by_hand():
    found = paired([1.0, 2.0, 3.0])
    # 4.302653 is the 97.5 % quantile of Student's t with two degrees of freedom.
    assert found.interval == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), abs=1e-5)
    assert (found.difference, found.effect, found.num_seeds) == (2.0, 2.0, 3)


@pytest.mark.parametrize("values", [[0.5], [0.5, 0.5]])
def test_what_has_no_spread_has_no_effect_size(values):
    found = paired(values)
    assert found.difference == 0.5 and found.effect is None and found.effect_interval is None
    assert found.interval == (None if len(values) == 1 else (0.5, 0.5))
    assert found.p is None


@pytest.mark.parametrize(("effect", "num_seeds"), [(0.3, 8), (2.9, 5), (-1.5, 5), (0.0, 3)])
def test_bounds_of_an_effect_make_the_observed_t_a_quantile(effect, num_seeds):
    from scipy.stats import nct

    root = num_seeds**0.5
    low, high = effect_interval(effect, num_seeds)
    assert nct.cdf(effect * root, num_seeds - 1, low * root) == pytest.approx(0.975, abs=2e-4)
    assert nct.cdf(effect * root, num_seeds - 1, high * root) == pytest.approx(0.025, abs=2e-4)
    assert low < effect < high


def test_an_interval_covers_the_true_effect_as_often_as_it_says():
    rng = np.random.default_rng(0)
    found = [paired((rng.standard_normal(5) + 1.2).tolist()) for _ in range(400)]
    inside = sum(one.effect_interval[0] <= 1.2 <= one.effect_interval[1] for one in found)
    assert abs(inside / 400 - 0.95) < 0.04


def test_the_mixed_model_with_a_random_seed_is_the_t_test_of_the_means_of_seeds():
    from scipy.optimize import minimize

    rng = np.random.default_rng(3)
    values = 0.4 + rng.standard_normal((6, 1)) + 0.7 * rng.standard_normal((6, 9))
    seeds = np.repeat(np.arange(6), 9)
    ones, same_seed = np.ones(54), (seeds[:, None] == seeds).astype(float)

    def fitted(logs):
        """Return mean, variance of it, and minus the restricted log-likelihood."""
        covariance = math.exp(logs[0]) * same_seed + math.exp(logs[1]) * np.eye(54)
        inverse = np.linalg.inv(covariance)
        precision = ones @ inverse @ ones
        mean = ones @ inverse @ values.ravel() / precision
        rest = values.ravel() - mean
        loss = np.linalg.slogdet(covariance)[1] + math.log(precision) + rest @ inverse @ rest
        return mean, 1 / precision, loss / 2

    best = minimize(lambda logs: fitted(logs)[2], [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-9})
    mean, variance, _ = fitted(best.x)
    own = paired(values.mean(axis=1).tolist())
    assert own.difference == pytest.approx(mean)
    half = (own.interval[1] - own.interval[0]) / 2
    assert half == pytest.approx(2.570582 * variance**0.5, rel=1e-4)  # 97.5 % quantile, five degrees


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.001], 10) == pytest.approx([1.0, 0.01])
    assert holm([]) == []


def test_holm_is_what_stepping_down_rejects():
    rng = np.random.default_rng(1)
    for _ in range(50):
        values = rng.uniform(0, 0.05, 7).tolist()
        rejected, left = set(), sorted(range(7), key=values.__getitem__)
        while left and values[left[0]] < LEVEL / len(left):
            rejected.add(left.pop(0))
        assert {index for index, p in enumerate(holm(values)) if p < LEVEL} == rejected


def test_claims_are_few_and_name_what_is_measured():
    assert len(CLAIMS) == len({claim.id for claim in CLAIMS}) == 19
    names = {*method_names()}
    for claim in CLAIMS:
        for side in (claim.ahead, claim.behind):
            assert side.method == BEST or side.method.split(" ")[0].removesuffix(",") in names
            assert side.preference in ("uniform", "labels") or side.method == BEST


def test_every_method_is_in_one_family():
    listed = [name for names in FAMILIES.values() for name in names]
    assert len(listed) == len({*listed}) and {*listed} | {"slerp", "nuslerp"} == {*method_names()}
    assert family_of("average, react") == "with training examples"
    assert family_of("tunable_magmax top-n") == "selection" and family_of("joint training") == "others"


def test_scores_of_tasks_add_up_to_those_of_the_target():
    owners = np.repeat([0, 1, 2], [9, 8, 7])
    base = np.random.default_rng(0).integers(0, 2, 24).tolist()
    targets = draw_targets(owners, Protocol(mixtures=((2, 1), (1, 1, 1)), draws=3), 0)
    found = parts_of(owners, targets, base)
    for target, counts, right in zip(
        targets, found["held_out_by_task"], found["base_model_by_task"], strict=True
    ):
        assert sum(counts) == len(target.held_out) and len(counts) == len(target.tasks)
        assert sum(right) == sum(base[row] for row in target.held_out)


def test_sums_by_task_by_hand():
    # Rows 0 and 1 are of task 0, 2 and 3 of task 1; the meta sample is row 1.
    target = Target((1, 1), (1, 0), (1, 3, 0, 2), 1)
    assert sums_by_task(np.array([0, 0, 1, 1]), target, [0.5, 1.0, 0.25]) == [0.75, 1.0]


def test_the_worst_task_by_hand_and_without_tasks_that_have_no_examples():
    assert worst([[8, 3], [6, 4]], [10, 5]).tolist() == [0.6, 0.6]
    assert worst([[8, 0]], [10, 0]).tolist() == [0.8]


def _family(seed: int, right: dict[tuple[str, str], float], *, tasks: int = 2, by_task: bool = True) -> dict:
    """Return stored results of one target: five examples of each task, the second of which is worse."""
    rows = [
        {"method": method, "preference": kind, "right": [[count, count - 1]], "chosen": [0]}
        | (
            {"right_by_task": [[[count / 2 + 1, count / 2 - 1], [count / 2, count / 2 - 1]]]}
            if by_task
            else {}
        )
        for (method, kind), count in right.items()
    ]
    return {
        "flags": "--data made",
        "family": f"t{tasks}s{seed}",
        "commits": ["here"],
        "machine": "none",
        "num_tasks": tasks,
        "num_train": 0,
        "seed": seed,
        "protocol": {"scalings": [0.5, 1.0], "fixed": 0.5},
        "targets": [{"meta": 1, "held_out": 10}],
        "held_out_by_task": [[5, 5]],
        "base_model_by_task": [[1, 2]],
        "estimates": {"labels": [0.1]},
        "base_model": [3],
        "rows": rows,
        "compare": {"labels": [{"right": 6}]},
        "schedules": [],
        "numbers_of_tasks": [],
        "sample_sizes": [],
    }


def _families(gain: float, **kind) -> list[dict]:
    """Return six seeds in which Tunable MAGMAX has `gain` more right answers than the average."""
    noise = (0.01, -0.01, 0.02, -0.02, 0.015, -0.015)
    return [
        _family(seed, {(OURS, "labels"): 4 + gain + extra, (AVERAGE, "uniform"): 4}, **kind)
        for seed, extra in enumerate(noise)
    ]


def _verdict_of(results: list[dict], name: str) -> dict:
    return next(row for row in verdicts.verdicts({2: results})[2] if row["id"] == name)


@pytest.mark.parametrize(("gain", "verdict"), [(2, "confirmed"), (-2, "refuted"), (0.001, "undecided")])
def test_a_verdict_has_the_sign_of_the_difference_and_needs_a_small_p(gain, verdict):
    row = _verdict_of(_families(gain), "blind-average")
    assert row["verdict"] == verdict and row["difference"] == pytest.approx(gain / 10)
    assert row["rival"] == [AVERAGE, "uniform", "tuned"]


def test_rows_that_are_missing_are_not_measured_and_count_in_the_correction():
    rows = verdicts.verdicts({2: _families(2)})[2]
    measured = [row for row in rows if "p" in row]
    assert [row["id"] for row in measured] == ["blind-average", "blind-average-worst"]
    assert {row["verdict"] for row in rows if "p" not in row} == {"not measured"}
    assert measured[0]["holm"] == pytest.approx(holm([row["p"] for row in measured], len(CLAIMS))[0])
    both = verdicts.verdicts({2: _families(2), 3: _families(2, tasks=3)})
    assert both[2][2]["holm"] > rows[2]["holm"]


def test_results_without_scores_by_task_have_no_worst_task():
    old = _families(2, by_task=False)
    assert _verdict_of(old, "blind-average-worst")["verdict"] == "not measured"
    assert _verdict_of(old, "blind-average")["verdict"] == "confirmed"
    assert not is_measured(old, (AVERAGE, "uniform"), "worst")
    mixed = [*_families(2)[:5], old[5]]
    assert not is_measured(mixed, (AVERAGE, "uniform"), "worst") and is_measured(mixed, (AVERAGE, "uniform"))
    assert "worst" not in make_tables(mixed)["main_table"]["2"][1]


def test_accuracy_of_the_worst_task_by_target_and_coefficient():
    (result,) = [_family(0, {(AVERAGE, "uniform"): 4})]
    # Of five examples each: 3 and 1 right with the first coefficient, 2 and 1 with the second.
    assert accuracies(result, (AVERAGE, "uniform"), "worst").tolist() == [[0.2, 0.2]]
    assert by_seed([result], (AVERAGE, "uniform"), "tuned", "worst") == [0.2]


def _alike(num: int) -> list[dict]:
    """Return seeds in which Tunable MAGMAX has the same number of right answers more than the average."""
    return [_family(seed, {(OURS, "labels"): 6, (AVERAGE, "uniform"): 4}) for seed in range(num)]


@pytest.mark.parametrize("results", [_families(2)[:1], _alike(3)])
def test_seeds_without_a_spread_decide_nothing(results):
    row = _verdict_of(results, "blind-average")
    assert (row["verdict"], row["p"], row["holm"]) == ("undecided", None, None)


def test_a_row_without_a_p_value_leaves_the_others_theirs():
    noisy = zip((4.1, 4.2, 4.4), _alike(3), strict=True)
    right = {(OURS, "labels"): 6, (AVERAGE, "uniform"): 4}
    results = [_family(one["seed"], right | {("ties", "uniform"): own}) for own, one in noisy]
    alike, varied = make_tables(results)["paired_tests"]["2"]
    assert (alike["method"], alike["tuned"]["p"], alike["tuned"]["holm"]) == (AVERAGE, None, None)
    assert varied["tuned"]["holm"] == pytest.approx(2 * varied["tuned"]["p"])


def test_the_best_rival_sees_no_training_examples_and_is_not_the_method_itself():
    right = {
        ("agreement", "labels"): 5,
        ("agreement", "uniform"): 9,
        (REGMEAN, "labels"): 9,
        ("average, react", "uniform"): 9,
        ("joint training", "uniform"): 9,
        (AVERAGE, "uniform"): 4,
        ("ties", "labels"): 6,
    }
    results = [_family(seed, right) for seed in range(3)]
    # The second coefficient has one right answer less, so tuned and in hindsight are the same.
    assert verdicts.best_rival(results, "agreement", "mean") == (("ties", "labels"), "tuned")
    alone = [_family(0, {("agreement", "labels"): 5})]
    assert verdicts.best_rival(alone, "agreement", "mean")[0] == (BEST, "")


def _against_all(left_out: set[tuple[str, str]] = frozenset(), **kind) -> list[dict]:
    """Return six seeds of `agreement` and of all that it has to beat, but for some rows."""
    rows = {("ties", "labels"): 5.0}
    for method in measuring.tried_methods():
        label = Candidate(locked_method(method), "", ()).label
        kinds = ("uniform", "labels") if measuring.uses_preference(method) else ("uniform",)
        rows |= {(label, own): rows.get((label, own), 4.0) for own in kinds}
    rows = {key: right for key, right in rows.items() if key not in left_out}
    noise = (0.01, -0.01, 0.02, -0.02, 0.015, -0.015)
    return [
        _family(seed, rows | {("agreement", "labels"): 7 + extra}, **kind) for seed, extra in enumerate(noise)
    ]


def test_the_best_of_all_rivals_tests_the_claim():
    results = _against_all()
    row = _verdict_of(results, "agreement-best")
    # All that sees no training examples, two of them by both selections, less those of two models and itself.
    blind = [name for name in method_names() if verdicts.is_blind_to_data(name)]
    assert row["num_rivals"] == len(blind) + 1 - len(measuring.OF_TWO) - 1
    assert (row["verdict"], row["rival"]) == ("confirmed", ["ties", "labels", "tuned"])


@pytest.mark.parametrize("missing", [("iso_c", "labels"), ("magmax", "uniform")])
def test_the_best_of_some_rivals_does_not_test_the_claim(missing):
    full, results = _against_all(), _against_all({missing})
    rows = verdicts.verdicts({2: results})[2]
    for row in (row for row in rows if row["id"].startswith("agreement-best")):
        assert row["verdict"] == "not measured in full" and row["holm"] is None
        assert row["num_rivals"] == _verdict_of(full, row["id"])["num_rivals"] - 1
    # It takes no step of the correction, and counts as a test for the others all the same.
    others = [row for row in rows if row.get("holm") is not None]
    assert min(row["holm"] for row in others) == pytest.approx(len(CLAIMS) * min(row["p"] for row in others))
    own = {name: by_number["2"] for name, by_number in make_tables(results).items()}
    text = claims_table({("digits", "2"): own, ("definitions", "2"): own})
    line = next(line for line in text.splitlines() if "best rival" in line and "all tasks" in line)
    assert line.endswith("| +20.0 [19.8, 20.2]: **not measured in full** |")
    assert "2 not measured in full" in text
    lines = ranked.tests_table(rows, "digits").splitlines()
    [line] = (one for one in lines if "best rival" in one and "all tasks" in one)
    rival = f"`ties`, labels, λ tuned, best of {row['num_rivals']} measured"
    assert line.endswith(f"| +20.0 [19.8, 20.2] to {rival} |  |  |")
    told = answers({("definitions", "2"): (results, own)}).splitlines()[-1]
    assert f"to `ties` +20.0 [19.8, 20.2] (the best of {row['num_rivals']}, not all)" in told


def test_rivals_without_scores_by_task_are_not_measured_for_the_worst_task():
    results = _against_all()
    for result in results:
        del next(row for row in result["rows"] if row["method"] == "iso_c")["right_by_task"]
    assert _verdict_of(results, "agreement-best")["verdict"] == "confirmed"
    assert _verdict_of(results, "agreement-best-worst")["verdict"] == "not measured in full"


def test_every_question_is_answered_here_or_on_a_page_that_is_there():
    results = _families(2)
    own = {name: by_number["2"] for name, by_number in make_tables(results).items()}
    told = answers({("digits", "2"): (results, own)}).split("**")
    for question, text in zip(QUESTIONS, told[4::4], strict=True):
        assert (question.answers is None) == bool(question.elsewhere), question.text
        if question.elsewhere:
            place, _, anchor = re.search(r"\]\(([^)]+)\)", text)[1].partition("#")
            heads = re.findall(r"^#+ (.*)$", (pages.PAGE.parent / place).read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads]
            assert re.search(r"\d.* by `python -m benchmarks\.", text), question.text
        else:
            assert "\n- digits, T = 2 (explored): " in text or "\n- not measured" in text
    assert not re.search("language_models|quantisation", answers({}, is_own=True))


def test_answers_of_other_benchmarks_have_the_numbers_of_their_pages():
    docs = pages.PAGE.parent
    lost = elsewhere.of_format().split(" See ")[0]
    assert lost in (docs / "language_models.md").read_text()
    rows = (docs / "mergeability.md").read_text().split("\n| definitions-0 |")[1].split("\n\n")[0]
    by_metrics = [float(row.split(" | ")[10]) for row in ("definitions-0 |" + rows).splitlines()]
    assert (
        f"metrics of the checkpoints {min(by_metrics):.2f} to {max(by_metrics):.2f}"
        in elsewhere.of_diagnosis()
    )
    by_group = re.search(r"`average`.*?\| (\+\d\.\d) \(", (docs / "tensors.md").read_text())[1]
    assert f"{by_group} [" in elsewhere.of_blocks()
    table = (docs / "quantisation.md").read_text()
    first = re.search(r"digits: int8 (\S+) to", elsewhere.of_compression())[1]
    assert f"| {float(first):+.1f} [" in table


def test_the_lead_over_blind_methods_is_over_the_best_of_three_groups():
    right = {(OURS, "labels"): 6, (AVERAGE, "uniform"): 5, ("wudi", "uniform"): 7, (REGMEAN, "uniform"): 8}
    results = [_family(seed, right) for seed in range(2)]
    tables = {"claims": [], "regrets": {}, "sample_losses": []}
    told = answers({("digits", "2"): (results, tables)})
    assert (
        "- digits, T = 2 (explored): `average` +10.0 [10.0, 10.0] (the best of the 5 of the claims); "
        "`wudi` -10.0 [-10.0, -10.0] (the best without training examples); "
        "`regmean` -20.0 [-20.0, -20.0] (the best with them)\n"
    ) in told
    assert "- definitions, T = 2: `average` +10.0" in answers({("definitions", "2"): (results, tables)})
    own = answers({("mine", "2"): (results, tables)}, is_own=True)
    assert "explored" not in own and QUESTIONS[0].short not in own


def test_the_best_of_recent_methods_says_of_how_many():
    right = {(OURS, "labels"): 6, ("wudi", "labels"): 5, ("tsv", "labels"): 4, ("ties", "labels"): 4}
    results = [_family(seed, right) for seed in range(2)]
    line = answers({("digits", "2"): (results, {"claims": [], "regrets": {}, "sample_losses": []})})
    assert "`wudi` +10.0 [10.0, 10.0] (the best of 2 published since 2024)" in line


@pytest.mark.parametrize(
    ("stored", "text"),
    [
        ({"digits"}, "To be tested on definitions and sentiment: no results are stored."),
        (
            {"digits", "definitions"},
            "Tested on definitions. To be tested on sentiment: no results are stored.",
        ),
        ({*CONFIRMED_ON}, "Tested on definitions and sentiment."),
    ],
)
def test_the_page_says_on_which_data_the_claims_are_tested(stored, text):
    assert pages.tests_of(stored) == text


@pytest.mark.parametrize(("kinds", "stands"), [(LABELS, "labels"), (LABELS[1:], "known"), ((), "uniform")])
def test_another_preference_stands_for_labels_where_tasks_share_them(kinds, stands):
    results = [_family(0, {(AVERAGE, kind): 4 for kind in ("uniform", *kinds)})]
    assert preference_of(results) == stands


def test_methods_are_ranked_and_the_best_of_each_family_stands_alone():
    right = {(OURS, "labels"): 6, ("magmax", "uniform"): 3, (AVERAGE, "uniform"): 4, (AVERAGE, "labels"): 7}
    rows = make_tables([_family(seed, right) for seed in range(2)])["main_table"]["2"]
    lines = [line.split(" | ")[:5] for line in ranked_table(rows, "labels").splitlines()[2:]]
    assert [(cells[0].strip("| "), cells[1], cells[2]) for cells in lines] == [
        ("", "", "base model"),
        ("1", "means", AVERAGE),
        ("2", "selection", OURS),
        ("3", "selection", "magmax"),
    ]
    best = ranked_table(rows, "labels", best_only=True).splitlines()
    assert best[0].startswith("| rank of 3 | family | best of the family |") and len(best) == 5
    assert lines[1][3:] == ["**40.0 ± 0.0**", "**70.0 ± 0.0**"] and lines[2][3:] == ["", "60.0 ± 0.0"]


def test_what_is_no_merge_stands_first_and_has_no_preference():
    results = [
        _family(seed, {(AVERAGE, "uniform"): 4, (AVERAGE, "labels"): 4})
        | {"references": {"own checkpoint": [[5, 4]], "joint training": [[4, 3]]}}
        for seed in range(2)
    ]
    rows = make_tables(results)["main_table"]["2"]
    lines = ranked_table(rows, "labels").splitlines()[2:]
    assert lines[:3] == [
        "|  |  | base model | 30.0 ± 0.0 |  | 20.0 ± 0.0 |  |",
        "|  |  | own checkpoint | 90.0 ± 0.0 |  | 80.0 ± 0.0 |  |",
        "|  |  | joint training | 70.0 ± 0.0 |  | 60.0 ± 0.0 |  |",
    ]
    assert lines[3].startswith("| 1 | means | average | **40.0 ± 0.0** |")
    del results[1]["references"]
    assert len(ranked_table(make_tables(results)["main_table"]["2"], "labels").splitlines()) == 4
    text = details("digits", make_tables([results[0]]), pages.RESULTS / "none")
    assert "|  | own checkpoint | 90.0 |  |  |  |  |  |\n|  | joint training | 70.0 |" in text


def test_the_command_of_a_page_says_seeds_and_sources():
    family = _family(3, {(AVERAGE, "uniform"): 4}) | {"flags": "--data made --first-seed 3"}
    found = pages.command_of([family, family | {"seed": 4, "sources": {}}])
    assert found == "`python -m benchmarks.continual --data made --first-seed 3 --seeds 2 --tasks 2`."
    found = pages.command_of([family | {"sources": {"data.noun": "0" * 64}}])
    assert found.endswith("--first-seed 3 --seeds 1 --tasks 2 --encoder MINILM --source SOURCE`.")


def test_seeds_that_do_not_follow_each_other_have_a_command_each():
    made = [(0, 2), (0, 3), (1, 2), (1, 3), (2, 2), (5, 2), (6, 2)]
    family = _family(0, {(AVERAGE, "uniform"): 4}) | {"flags": "--data made"}
    found = pages.command_of([family | {"seed": seed, "num_tasks": number} for seed, number in made])
    assert (
        found
        == ", ".join(
            f"`python -m benchmarks.continual --data made {rest}`"
            for rest in (
                "--seeds 2 --tasks 2 3",
                "--first-seed 2 --seeds 1 --tasks 2",
                "--first-seed 5 --seeds 2 --tasks 2",
            )
        )
        + "."
    )


def test_only_data_that_were_not_looked_at_have_verdicts():
    tables = make_tables(_families(2))
    own = {name: by_number["2"] for name, by_number in tables.items()}
    text = claims_table({("digits", "2"): own, ("definitions", "2"): own})
    assert "| claim | accuracy of | definitions, T = 2 |" in text and "**confirmed** |" in text
    assert (
        "definitions, T = 2: 2 confirmed, 0 refuted, 0 undecided, 0 not measured in full, 17 not measured."
        in text
    )
    explored, tested = (ranked.tests_table(own["claims"], data) for data in ("digits", "definitions"))
    assert "confirmed" not in explored and "| Cohen's d | p, corrected |\n" in explored
    assert len(explored.splitlines()) == 4 and "| confirmed |" in tested
    assert claims_table({("digits", "2"): own}) == "No results of data that test the claims are stored.\n"


def test_three_data_sets_fit_on_the_page(tmp_path):
    results = tmp_path / "results"
    shutil.copytree(pages.RESULTS, results)
    for data in ("definitions", "sentiment"):
        shutil.rmtree(results / data, ignore_errors=True)
        (results / data).mkdir()
        for path in (results / "digits").glob("t5s*.json"):
            shutil.copy(path, results / data)
    page = tmp_path / "docs" / "experiments.md"
    page.parent.mkdir()
    assert len(pages.render(results, page).splitlines()) <= 300
    assert {path.name for path in page.parent.glob("*.md")} == {
        "experiments.md",
        *(f"experiments_{data}.md" for data in ("definitions", "digits", "sentiment")),
    }


def test_the_pages_are_what_the_stored_results_say():
    stored = json.loads((pages.RESULTS / "digits" / "tables.json").read_text())
    text = pages.PAGE.read_text(encoding="utf-8")
    rest = (pages.PAGE.parent / "experiments_digits.md").read_text(encoding="utf-8")
    for number, rows in stored["main_table"].items():
        assert f"### Accuracy, T = {number}\n\n| rank | method | uniform: λ = 0.5 |" in rest
        for row in rows:
            assert f"{100 * row['fixed'][0]:.1f} ± {100 * row['fixed'][1]:.1f}" in rest
            if row["preference"] in ("uniform", "labels"):
                assert f"{100 * row['tuned'][0]:.1f} ± {100 * row['tuned'][1]:.1f}" in rest
        for row in stored["claims"][number]:
            assert "difference" not in row or f"{100 * row['difference']:+.1f} [" in rest
    for row in json.loads((pages.RESULTS / "definitions" / "tables.json").read_text())["claims"]["5"]:
        assert f"{100 * row['difference']:+.1f} [" in text


def test_rendering_the_stored_results_gives_the_stored_pages(tmp_path):
    shutil.copytree(pages.RESULTS, tmp_path / "results")
    page = tmp_path / "docs" / "experiments.md"
    page.parent.mkdir()
    assert pages.render(tmp_path / "results", page) == pages.PAGE.read_text(encoding="utf-8")
    written = [path for path in page.parent.rglob("*") if path.is_file()]
    data = [path for path in pages.RESULTS.iterdir() if path.is_dir()]
    assert len(written) == 1 + 3 * len(data)  # a page and two pictures for each
    for path in written:
        stored = pages.PAGE.parent / path.relative_to(page.parent)
        assert path.read_bytes() == stored.read_bytes(), path.name
