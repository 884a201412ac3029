"""The choices of an answer, from the engine to whoever writes them."""
