"""Tasks that need depth, and the training of small models that sleep on them. No kernel needs any of it."""
