"""Choose LoRA ranks from the changes that fine-tuning makes, as a file and as adapters of peft.

- `deltas`: `delta_spectra` and `delta_factors`, the spectra and the factors of W_tuned - W_base, from two checkpoints.
- `noise`: `noise_edge`, what the largest value of noise exceeds once in a thousand cases.
- `ranks`: ranks from spectra: a threshold, rounding, smoothing, a budget; uniform and random ranks to compare with.
- `rank_rule`: `RankRule`, these rules with their options as one object.
- `rank_config`: `RankConfig`, the exact rank of every module as a file and as `peft.LoraConfig`.
- `module_names`: find the modules of a file in a model that names them differently.
- `warm_start`: start an adapter from the change, whatever form a module keeps its weight in.
- `adapters`: load a frozen model, add an adapter with one of four starts, load a saved adapter.
"""
