"""The families of language models whose weights come in and go out: one table of tensors and one of settings each."""
