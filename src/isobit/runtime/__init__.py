"""Running a model: sequences, sampling, generation."""
