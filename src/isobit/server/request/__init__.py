"""What clients ask, from any interface to what the engine is asked."""
