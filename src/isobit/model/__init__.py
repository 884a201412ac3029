"""What a model is made of: stages, tensors by role."""
