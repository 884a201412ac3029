"""Text: the tokenizer of a GGUF file and its chat template."""
