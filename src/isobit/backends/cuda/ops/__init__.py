"""How each kind of operation becomes launches: a file of the kind's name, beside its kernel.

``supports(op)`` is None, or the reason why there is no kernel for it; ``lower(g, op)`` puts what it
gives somewhere and emits its launches.
"""
