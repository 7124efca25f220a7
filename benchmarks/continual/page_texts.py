"""What stands around the tables of docs/experiments.md."""

HEAD = """# Experiments

Written by `python -m benchmarks.continual --render` from `benchmarks/results/experiments/`; not by hand.
Experiments of one subject stand with it: training and merging in rounds in [alternating.md](alternating.md),
vectors of quantisation in [quantisation.md](quantisation.md), what can be predicted of a merge in
[mergeability.md](mergeability.md), routing in [routing.md](routing.md), questions that samples never solve in
[blindspots.md](blindspots.md), definitions learned by MiniLM in [walkthrough.md](walkthrough.md). Other data,
and your own checkpoints: [experiments_own.md](experiments_own.md).

- **digits:** scikit-learn's 1,797 images of 8 by 8 pixels and a small ViT, as `hub-magmax quickstart` makes
  them; the digits in 5 or 10 groups, each learned from the checkpoint before it. λ: 0.1 to 0.7, and 1.
- **definitions:** WordNet's nouns in 20 classes, read by all-MiniLM-L6-v2, whose two uppermost layers learn;
  5 tasks of four classes, each learned from the checkpoint before it. λ: 0.1, 0.3, 0.5, 0.7, 1.
- **sentiment:** the same encoder and λ; tweets, films, products and editorials, positive or negative, in 4
  tasks, each learned from the base model. No results are stored of **languages**, sections of Debian's
  packages by descriptions in six languages.

Tasks of a data set share a frozen head: the classifier above the network, which no task changes. A seed draws
the parts of the data, what is drawn in learning, and the targets.

In short: no rule wins everywhere. A preference gains accuracy in the mean on definitions and digits, hardly
on sentiment, and the worst task of a target often pays for it. Under one preference `ties` leads on
definitions among methods without training examples, level with `agreement`; on sentiment `wudi`, `ties` and
Tunable MAGMAX are level; on digits `agreement` leads, where it was designed. Who has training examples of
the tasks does far better with them on definitions. Few seeds leave most claims undecided.
"""

OWN_HEAD = "# Experiments\n\nWritten by `python -m benchmarks.continual` from the results in this folder.\n"

PROTOCOL = """
T is the number of tasks that are merged, and a preference their weights, which sum to 1. A target mixes a
few of them, drawn from the test examples; a tenth of it, the meta sample, estimates the preference and tunes
the scaling coefficient λ, and the rest is scored over all classes. `uniform` is no preference, `labels`
counts the labels of the meta sample; where tasks share labels, the shares of the tasks that were drawn stand
for it, `known`. `transport` estimates them without labels. Every method has its default options, tries the
same λ, and is tuned by the same rule, as `compare` would. The same λ is not the same chance: methods that
add task vectors up (`task_arithmetic`, `dare`, `della_linear`) would need λ / T, so the grid begins too high
for them, and they are understated, at T = 10 most; others are best at its upper end. A meta sample is small:
the page of each data set says how small. Accuracy is in per cent, the mean over the targets of a seed and
then over seeds; that of the worst task is the lowest among the tasks of a target, averaged likewise.
"""

CLAIMS = """
## Claims

Chosen from what digits showed, and frozen in `benchmarks/continual/claims.py` (commit f6cf1b5, 1 December
2026) before any method was measured under this protocol on the data that test them; on digits they are
explored. Smaller runs on definitions had been seen, on seeds 0 to 5 ([walkthrough.md](walkthrough.md),
[mergeability.md](mergeability.md), [quantisation.md](quantisation.md)). {tests}

In the first claims both sides tune λ on the labelled meta sample, and one takes its preference from it, too:
they test what a preference buys. The others ask for the better method under the same preference; that
Tunable MAGMAX is ahead of `average` there is not claimed, since digits do not show it (second question
below). `agreement` is ours, and was designed on seeds 0 to 2 of digits. [methods.md](methods.md) explains
every method; `regmean` and `react` see training examples of every task, and those that they are compared
with here do not.

After the freeze, and before the results that are stored, the protocol of definitions and sentiment was
shortened for time: 15 targets of at most 120 examples, fewer schedules, corrected merges without a
preference alone, and ten methods, which leaves the two claims about the best rival untested.

λ is tuned unless the claim says otherwise. Tunable MAGMAX is its selection `algorithm-1`, the default,
unless [`top-n`](methods.md#tunable_magmax) is named. A cell has the points that the first is ahead of the
second, with a 95 % interval, and the p-value of a paired t-test, two-sided, after Holm's correction over all
claims of the data set. Effect sizes, and what was explored on digits, stand on the pages of the data sets.
The unit is the seed: targets of one seed share checkpoints. With as many targets for every seed, this is the
test of a mixed model with a random effect of the seed. Confirmed is p < .01 in the direction claimed,
refuted in the other one. The best rival in hindsight is chosen on the scored examples themselves, among all
methods that see no training examples; where some of these were not measured, the claim is not tested. Few
seeds confirm little: the smallest p of 19 passes at d = 4.6 with five seeds, and at 2.2 with eight;
undecided says that there are too few seeds, and not that nothing differs. Where a data set has two T, all 38
are corrected together, those that were not measured included. Intervals are those of one claim alone.

"""

OWN_QUESTIONS = """
## Questions

Points with 95 % intervals over seeds, each of one comparison alone, λ tuned and the preference from labels
unless said otherwise.

"""

QUESTIONS = """
## Questions

Points with 95 % intervals over seeds, each of one comparison alone, λ tuned and the preference from labels
unless said otherwise. They describe; what is tested stands above. The sentences in bold are ours. The command
for each data set stands with its table below; MINILM and SOURCE are explained in
[experiments_own.md](experiments_own.md).

"""

RANKED = """
## Methods

Accuracy with λ tuned, mean ± standard deviation over seeds: the best method of each family, with its rank
among all, which the page of each data set has. The rank is that of the better of uniform preference and
labels. `regmean`, `regmean_plusplus`, `fisher` and `average, react` (the average with `correction: react`)
see training examples of every task. A cell is empty where nothing was measured, or where a method ignores the
preference. Left out are `slerp` and `nuslerp`, which merge two models. What is no merge has one number: `own
checkpoint` is that of the task of each example, which has to be known, and `joint training` learned from all
tasks together.

Pictures: accuracy with λ tuned, with 95 % intervals over seeds; and the points that methods lose at each λ to
the row and λ that are best in hindsight, which may be one with training examples that is not drawn.
"""

QUICK = """
`make experiments-quick` measures six methods again, on digits at T = 5, into `experiments/results`.
"""

COLUMNS = """
Every method is tried with the same λ. Three columns say how λ was found: 0.5 for all; on each target's meta
sample, as `compare` would; the one that is best in hindsight for all targets, found on the scored examples
themselves and so no result anyone would get; tuned λ differ by target, and can be better. Accuracy is in per
cent, mean over the targets of a seed, then mean ± standard deviation over seeds. `transport` fits a mixture
of training samples to the meta sample without labels; `published` compares the target with each task by
itself, as in the paper. `regmean_plusplus` has statistics of the merge with λ = 1, and its task vector is
scaled. `compare` does not choose methods that see training examples. A cell is empty where nothing was
measured, or where a method ignores the preference. Commits are those of the working copies that measured, not
all of which became part of the history.
"""
