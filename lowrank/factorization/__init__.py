"""Work on one weight matrix: truncate it in a norm that data define, and choose its rank.

- `moments`: `LayerStatistics`, the second moments of a layer, and what follows from them: whitening, shrinkage, centring.
- `block_sums`: the formulas of the moments for one block of tokens.
- `running_moments`: add moments up over many blocks.
- `methods`: `METHODS`, what the outputs and the inputs of a weight count for in each method.
- `weighting`: `Weighting`, which holds that, and its checks.
- `factorize`: `factorize`, the best factors in a weighted norm; `weighted_norm`, that norm.
- `sides`: which moments a method needs of a layer, of its inputs or of its outputs.
- `decompositions`: the leading directions of a weight, from the smaller side.
- `transfer`: the best weight for inputs that have changed, from moments of both inputs.
- `storages`: `STORAGES`, the forms of storing factors, with their costs.
- `rank_allocation`: ranks within a budget of parameters.
- `spectra`: effective rank, energy and other functions of singular values.
- `precision`: the device of exact computations, for devices without float64.
- `gram`: squared singular values from Gram matrices.
- `alternatives`: other computations of the whitened optimum, for comparison.
"""
