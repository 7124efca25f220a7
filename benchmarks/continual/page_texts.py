"""What stands before and behind the tables of docs/experiments.md."""

HEAD = """# Experiments

Written by `python -m benchmarks.continual --render` from `benchmarks/results/experiments/`; not by hand.
Experiments of one subject stand with it: training and merging in rounds in [alternating.md](alternating.md),
vectors of quantisation in [quantisation.md](quantisation.md), what can be predicted of a merge in
[mergeability.md](mergeability.md), routing in [routing.md](routing.md), questions that samples never solve in
[blindspots.md](blindspots.md), definitions learned by MiniLM in [walkthrough.md](walkthrough.md).
"""

OWN_HEAD = "# Experiments\n\nWritten by `python -m benchmarks.continual` from the results in this folder.\n"

INTRODUCTION = """
Tasks are learned one after the other, each from the checkpoint before it, with a frozen head that all share.
A target mixes a few tasks, drawn from the test examples; a tenth of it, the meta sample, estimates the
preference and tunes the scaling coefficient λ, and the rest is scored over all classes. Accuracy is in per
cent, mean over the targets of a seed, then mean ± standard deviation over seeds.

Every method is tried with the same λ. Three columns say how λ was found: 0.5 for all; on each target's meta
sample, as `compare` would; the best one in hindsight, found on the scored examples themselves and so no
result anyone would get. `uniform` is no preference. `labels` counts the labels of the meta sample,
`transport` fits a mixture of training samples to it without labels; `published` compares the target with
each task by itself, as in the paper. Methods have their default options. `regmean`, `regmean_plusplus` and
`fisher` see training examples of every task besides, and so does `average, react`, the average with
`correction: react`; `regmean_plusplus` has statistics of the merge with λ = 1, and its task vector is scaled.
`compare` does not choose them below. Left out are `slerp` and `nuslerp`, which merge two models. A cell is
empty where nothing was measured, or where a method ignores the preference.
"""

OTHERS = """
## Other data

Not run where this page was written. The same code is tested with small models, and data of the same form on
disk. Each command learns, measures, and adds its section to this page; a finished checkpoint is kept.

```console
accelerate launch -m benchmarks.continual --data cifar100     # CLIP ViT-B/16; 5, 20 and 50 tasks
accelerate launch -m benchmarks.continual --data imagenet-r
accelerate launch -m benchmarks.continual --data language --sequence four            # T5-large
accelerate launch -m benchmarks.continual --data language --sequence four --adapters # LoRA on q and v
accelerate launch -m benchmarks.continual --data language --sequence fifteen
```

AdamW, weight decay 0.1, cosine with 10 % warm-up, gradient norm at most 1, 10 epochs, batch 128; learning
rate 1e-5, and 1e-3 for adapters, which is a choice of ours. Image tower and projection are learned against a
frozen head made of the class names; classes are grouped at random, by seed. ImageNet-R has no training split:
four fifths of it become one. After each task an adapter's product (rank 8, factor 32/8) is added to the
weights. For texts the preference is the known mixing ratio. `--dataset`, and a YAML file for `--sequence`,
take other data of the same form.

Checkpoints that are there already need a recipe only, with examples for every task under `evaluation`, and
one for each seed. Nothing is learned then:

```console
python -m benchmarks.continual --checkpoints mine-0.yaml mine-1.yaml --output mine
```

Results of your own data, checkpoints or settings, and their page `experiments.md`, go to `--output`, by
default `experiments/results`, and never to this page.
"""
