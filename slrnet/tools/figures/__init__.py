"""The paper's figures and tables from checkpoints and records of runs: `slrnet figures`."""

FIGURES = {"fig2": 2, "fig3": 4, "fig5": 9, "fig7": 2}
"""The figures, and how many images, rows, classes and images of each epoch fit on a page."""
