"""Requests without a socket: files of them, and one at a time."""
