"""The paper's figures and tables from checkpoints and records of runs: `python -m slrnet.tools.figures`."""
