"""Files of the output's tokenizer: those of a source, with the tokens of others and a chat template."""
