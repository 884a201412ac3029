"""The device: finding and testing it, its memory, how weights lie there."""
