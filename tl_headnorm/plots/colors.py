"""Colours of figures: of series, of no data, and the scales of maps."""

# Okabe and Ito's colours, told apart by the colour-blind, and a few more after them.
PALETTE = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#6a3d9a",
    "#17becf", "#7f7f00", "#b15928",
)  # fmt: skip
GREY, DARK, NO_DATA = "#8a8a8a", "#333333", "#d0d0d0"
SEQUENTIAL, DIVERGING, WEIGHTS = "viridis", "RdBu_r", "Blues"  # diverging: red is more
