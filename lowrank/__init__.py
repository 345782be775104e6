"""Low-rank compression of transformers: exact methods, honest counting, reproducible results.

Import from the module that bears the concept's name, for example `from lowrank.factorization.methods import METHODS`. This file
imports nothing, so that the command line and the Snakefile start without loading torch.
"""

__version__ = "0.1.0"
