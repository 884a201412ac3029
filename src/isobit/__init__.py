"""isobit: the same model file and the same tokens give the same bits on every backend."""
