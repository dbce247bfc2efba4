"""Names that settings, which load no torch, share with the modules that compute."""

# z of an ablated head: zero, or from reference samples (`replacements`).
REPLACEMENTS = ("zero", "mean", "mean_position", "resample", "gaussian")
# Those that are the same at every position and for every input.
CONSTANT_REPLACEMENTS = ("zero", "mean")
# Attribution methods whose large scores say that a head is useful; the others are changes of the
# loss and negative there.
_POSITIVE = ("michel", "atp_zero", "atp_mean", "atp_corrupted")


def useful_sign(method: str) -> int:
    """+1 or -1: times this, a larger score of the attribution method is a more useful head."""
    return 1 if method in _POSITIVE else -1
