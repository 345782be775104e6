"""Low-rank compression of transformers: exact methods, honest counting, reproducible results.

`from lowrank import compress` and the other public names of `__init__.pyi`; each is loaded when it is first used, so that
`import lowrank` costs next to nothing and loads no torch.

- `io`: files and identities: hashes, JSON records, weights by name, cache, provenance, processes.
- `factorization`: one weight matrix: moments, methods, spectra, storages, rank allocation.
- `nn`: any PyTorch model: find its linear layers, feed it a batch, swap layers, measure a pass.
- `calibration`: from data to the statistics of layers.
- `compression`: whole models: compress, prune, fold, save, load.
- `training`: the training loop; PREHAB before truncation, OIALR during training, refinement after.
- `selection`: which layers matter: spectral exponents, pruning ratios, assignment.
- `lora`: LoRA ranks from weight deltas, as a file and as peft adapters.
- `tasks`: what experiments run on: data, model, metric, cached baseline, sweeps.
- `pi3`: the π³ model from checkpoint to evaluation.
- `report`: from notebooks to results: parameters, runner, tables, README, site.
"""

import lazy_loader

from lowrank.io.after_import import follow_import

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

# `from_pretrained` of transformers reads folders of compressed models; transformers itself is not loaded here.
follow_import("transformers.quantizers.auto", "lowrank.compression.quantizer")
