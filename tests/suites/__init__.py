"""Suites that others wrote, run against this server. Not part of pytest: python -m tests.suites."""
