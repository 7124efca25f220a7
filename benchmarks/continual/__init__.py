"""The experiments: tasks learned one after the other, merged for targets that mix a few of them.

`protocol` draws the targets, `sources` makes the checkpoints, `estimating` turns the meta samples into
preferences, `measuring` merges and scores, `results` condenses that to one stored file per family. From the
stored files alone, `tables` and `verdicts` test what `claims` says, and `pages` writes what people read.
"""
