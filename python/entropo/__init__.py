"""entropo: train coding agents on whole trajectories without losing diversity, pick the best of n.

Imports nothing heavy: every stage is a subpackage of its own, and none needs the others.
"""

__version__ = "0.1.0"
