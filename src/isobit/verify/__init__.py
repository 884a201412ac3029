"""Tools that show where two runs part: trace, diff, verify, receipts, accuracy, ablation.

Running and comparing are separate phases joined by a saved file. Nothing in the engine imports
this package.
"""
