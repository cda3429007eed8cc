"""Training: one step and the loop around it, optimiser, checkpoints, metrics, evaluation, tracking.

Ray is known to `ray_loop` alone and MLflow to `tracking` alone; everything else here runs, and is tested, without them.
"""

from __future__ import annotations
