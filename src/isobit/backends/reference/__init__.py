"""The reference backend: the specification run as it is written, in NumPy."""

from isobit.backends.reference.backend import ReferenceBackend

__all__ = ["ReferenceBackend"]
