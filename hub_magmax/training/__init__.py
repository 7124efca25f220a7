"""Training of the checkpoints that a recipe merges: one function, `finetuning.finetune`."""
