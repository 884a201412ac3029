"""Digests of rows of logits, which a device can make of many small pieces at once."""

import hashlib

PIECE = 256  # bytes


def tree_digest(data: bytes) -> bytes:
    """SHA-256 (FIPS 180-4) of at most PIECE bytes; of more, the same of the digests of the pieces
    of PIECE bytes that they are cut into, one after the other. 32 bytes."""
    while len(data) > PIECE:
        pieces = (data[i : i + PIECE] for i in range(0, len(data), PIECE))
        data = b"".join(hashlib.sha256(piece).digest() for piece in pieces)
    return hashlib.sha256(data).digest()
