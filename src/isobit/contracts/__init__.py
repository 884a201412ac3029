"""Contracts: what a backend promises, which measurement would refute it, and what was measured.

A contract is a YAML file. ``document`` reads it with line and column, ``schema`` types it,
``validate`` and ``lint`` judge the text, ``check`` runs its measures and writes ``evidence``,
``status`` puts promises and evidence side by side, ``amend`` adds to its history. Nothing here
believes a status that somebody typed.
"""
