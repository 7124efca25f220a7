"""What stands around the tables of docs/experiments.md."""

HEAD = """# Experiments

Written by `python -m benchmarks.continual --render` from `benchmarks/results/experiments/`; not by hand.
Experiments of one subject stand with it: training and merging in rounds in [alternating.md](alternating.md),
vectors of quantisation in [quantisation.md](quantisation.md), what can be predicted of a merge in
[mergeability.md](mergeability.md), routing in [routing.md](routing.md), questions that samples never solve in
[blindspots.md](blindspots.md), definitions learned by MiniLM in [walkthrough.md](walkthrough.md). Other data,
and your own checkpoints: [experiments_own.md](experiments_own.md).

Tasks share a frozen head. Those of digits and definitions are learned one after the other, each from the
checkpoint before it; those of sentiment and languages each from the base model.
"""

OWN_HEAD = "# Experiments\n\nWritten by `python -m benchmarks.continual` from the results in this folder.\n"

PROTOCOL = """
T is the number of tasks that are merged. A target mixes a few of them, drawn from the test examples; a tenth
of it, the meta sample, estimates the preference and tunes the scaling coefficient λ, and the rest is scored
over all classes. `uniform` is no preference, `labels` counts the labels of the meta sample; where tasks share
labels, the `known` shares stand for it. Every method has its default options, tries the same λ, and is tuned
by the same rule, as `compare` would. Accuracy is in per cent, the mean over the targets of a seed and then
over seeds; that of the worst task is the lowest among the tasks of a target, averaged likewise.
"""

CLAIMS = """
## Claims

Chosen from what digits showed, and frozen in `benchmarks/continual/claims.py` before the data that test them
were measured; on digits they are explored. {tests}

λ is tuned unless the claim says otherwise; `algorithm-1` and `top-n` are two selections of
[Tunable MAGMAX](methods.md#tunable_magmax). A cell has the points that the first is ahead of the second, with
a 95 % interval; the effect size, Cohen's d of paired seeds, with its interval; and the p-value of a paired
t-test, two-sided, after Holm's correction over all claims of the data set. The unit is the seed: targets of
one seed share checkpoints. With as many targets for every seed, this is the test of a mixed model with a
random effect of the seed. Confirmed is p < .01 in the direction claimed, refuted in the other one. The best
rival in hindsight is chosen on the scored examples themselves, among all methods that see no training
examples; where some of these were not measured, the claim is not tested. Few seeds confirm little: the
smallest p of 19 passes at d = 4.6 with five seeds, and at 2.2 with eight.

"""

QUESTIONS = """
## Questions

Points with 95 % intervals over seeds, λ tuned and the preference from labels unless said otherwise; p-values
here are not corrected. The command for each data set stands with its tables below.

"""

RANKED = """
## Methods

Accuracy with λ tuned, mean ± standard deviation over seeds; families by their best method, and methods by
the better of their columns. `regmean`, `regmean_plusplus`, `fisher` and `average, react` (the average with
`correction: react`) see training examples of every task. A cell is empty where nothing was measured, or where
a method ignores the preference. Left out are `slerp` and `nuslerp`, which merge two models. What is no merge
has one number: `own checkpoint` is that of the task of each example, which has to be known, and `joint
training` learned from all tasks together.

Pictures: accuracy with λ tuned, with 95 % intervals over seeds; and the points that methods lose at each λ to
the row and λ that are best in hindsight.
"""

QUICK = """
`make experiments-quick` measures six methods again, on digits at T = 5, into `experiments/results`.
"""

COLUMNS = """
Every method is tried with the same λ. Three columns say how λ was found: 0.5 for all; on each target's meta
sample, as `compare` would; the best one in hindsight, found on the scored examples themselves and so no
result anyone would get. Accuracy is in per cent, mean over the targets of a seed, then mean ± standard
deviation over seeds. `transport` fits a mixture of training samples to the meta sample without labels;
`published` compares the target with each task by itself, as in the paper. `regmean_plusplus` has statistics
of the merge with λ = 1, and its task vector is scaled. `compare` does not choose methods that see training
examples. A cell is empty where nothing was measured, or where a method ignores the preference.
"""
