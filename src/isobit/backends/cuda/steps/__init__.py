"""What runs a model's passes: batches of any kind, captured steps, steps begun ahead of the
host."""
