"""Texts of docs/performance.md and peers.md: what stands above each table of results."""

TITLE = """# Performance

Written by `python -m benchmarks.performance` from `benchmarks/results/performance.json`, which the commands
named below fill. Measured on six checkpoints, a base model and five tasks, with random weights and with the
names and shapes of real models, under the preference `{geometric: {ratio: 0.7}}`. Weights are normal, of
deviation .02. Task vectors have deviation .002, and half of their elements are zero in bfloat16. Where
another deviation is named they are dense and as small as those of real fine-tunes, which bfloat16 rounds:
with 1e-4, 32 % of the elements are zero and 23 % have the commonest other magnitude, with 2e-5 78 and 8 %.
Seconds are of whole processes, and medians of the runs stated, after one that may compile; what takes longer
than a minute is measured once. Warm means that files are in the page cache, where they are if nothing else is
said. Memory is what the processes of a command hold together of their own, with Python in it, looked at every
hundredth of a second; files that they map are not in it, because the system can take them back.
"""

PEERS_TITLE = """# Beside mergekit

Written by `python -m benchmarks.performance` from `benchmarks/results/performance.json`, which the command
named below fills. The checkpoints and the preference are those of [performance.md](performance.md): a base
model and five tasks.
"""

METHODS = """## Every method

The floor is reading every byte of the inputs, and writing as many as the output has, plainly. The aim is to
stay near it for every method: with a warm page cache at most 1.5 times for those that read the files once,
2.5 for quotas and thresholds, 3.5 for quotas in the scope `model`; cold 1.15, 1.3 and 2.2; and besides, what
`import torch` takes. A merge by compiled loops does not import torch and has this time for its work, so the
times of the floor, which are of whole processes, may be more than these numbers. The floor is strict: its
reads go into a buffer of 1 MB that stays in the nearest cache, begins at a page, and is thrown away, so it
moves 15 to 20 GB/s, where any use of the values starts with fetching them from memory. It is the median of as
many times before and after the methods as they have runs, and it varies: half of it is the disk's, and what
its output takes of new memory, which costs 2 s of a processor per GB where a hypervisor takes back what is
free. A merge notices that, and lets go of what it stored. Cold numbers are of one run each, and the disk is
not as fast in each: below 1 means no more than that.

Methods of one pass, such as `average` and `magmax`, take as long as two cores need to read, convert, add and
round; the rest of their time, some .5 s whatever the size, is Python's: modules, headers, plan. Those that
trim, such as `ties`, and `top-n` look at a tensor and merge it meanwhile: a sample decides most elements
before, and the few per cent that stay open are merged when the tensor is known. `algorithm-1` and the scope
`model` read their files twice. The prices of `top-n` cost most on tensors of a few million elements, where
samples are a large part. The scope `model` keeps a byte or more per element in files. While a tensor is
looked at the system reads the next ones from the disk, so methods that compute longer wait less. The first
large merge of an environment compiles for 6 to 15 seconds, which is not in the tables. Every merge report
says how long threads read, computed, wrote and hashed (`profile`).
"""

MATRICES = """## Whole matrices

Methods that hold one matrix of every task and decompose or solve it, run once, by torch on all cores. On
adapters they compute with the factors. Their time grows with the cube of a matrix's smaller side and, on
adapters, of the sum of the ranks; what reads and writes is little beside it.
"""

SITES = """## Many sites

`hub-magmax run` of a recipe with so many sites, beside as many runs of one site each (the time of one, times
the sites). The floor is reading every input byte once and writing the outputs of all sites, plainly. The aim
is 1.15 times the floor, out of reach of files that are hashed: on two cores it leaves .64 s of processor for
500 MB, of which writing takes .22, sha256 .39, reading back .11, and merging an average .4 more: 2 times at
best. What sites share is chunks, samples and openings ([sites.md](sites.md)).
"""

PEERS = """## The same merges

The same files, weights, densities and size of shards, for methods that both have; for both the whole process,
and as many threads as there are cores. mergekit computes in the checkpoints' dtype, which is its fastest way,
and we in float32; its `linear` adds up in float32 (since 0.1.5) and does not read the base model. We force
files to the disk, read them back and compare their sha256; it leaves writing to the system. Of the families
here mergekit 0.1.5 merges the Llamas; it asks for a pooler that `BertForMaskedLM` does not have, and does not
load `CLIPModel`. Of 0.25B, the rows of `della` (half the time now) and `arcee_fusion` (less memory) are of
before that. `arcee_fusion` takes longer, and more memory, here than in mergekit at 1B, and less time at
0.25B; it finds exact quartiles, where mergekit draws a million elements. At 1B other work took most of the
machine (load 10 to 18) for all but `ties`: seconds are too many, ours and mergekit's.
"""

PROCESSES = """## Two processes

One process with one thread beside two of one thread each (`ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu
--num_processes 2 -m hub_magmax merge ...`). Seconds are of whole commands, and then of the merge alone, as
its report has them. Launching costs some three seconds: accelerate, and torch, which is imported by the
launcher and then by the processes, while one process alone needs neither. Every file is the same by sha256,
besides the merge report, which tells times. One process uses up to eight cores without a launcher.
"""

SELECTING = """## The rules alone

Nanoseconds per element that the rules of `tunable_magmax` take on one thread, from task vectors in memory to
the winner of each element. Task vectors are random, normal and float32, so few elements tie. Preferences are
flat; one-sided, each task seven tenths of the one before; and one-hot, all but one task a thousandth each.
"""

IN_MEMORY = """## In memory, before and after

`compare`, `sweep` and the search for a preference merge in memory, many times from the same checkpoints, and
write nothing. Seconds are the mean of one merge: one method under one preference, to a whole model in memory,
without evaluation. Processor seconds count all threads. The load is the mean number of threads of the whole
machine that could run, those of other work included; where it is above the number of cores, seconds are too
many and processor seconds say more. The last row is the time of 60 merges, 15 of each method, for which the
aim is 60 s on two cores; of a method of which fewer were measured it has 15 times their mean. Before: the
eager operations of torch, on one thread.
"""

VERSUS = """## Before and after

Every method in two versions of the package, named by the last commits that changed it (`+`: with changes
after that), on the same files in the page cache. Runs alternate between the two, so that whatever else slows
the machine slows both. Medians of seconds and of processor seconds (user and system, all processes); the
first run of each version may compile and does not count.
"""
