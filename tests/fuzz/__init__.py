"""Hostile inputs: no crash, no hang, no gigabytes, and no exception but those of errors.py.

``python -m tests.fuzz --help`` runs them by hand; test_fuzz.py runs a few in CI.
"""
