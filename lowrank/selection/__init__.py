"""Decide which layers of a model matter, from the spectra of their weights, and give runs of layers to devices with budgets.

- `esd`: `esd_metrics`, the metrics of the spectrum of one weight; `eigenvalues`.
- `power_law`: fit the power law of the tail of a spectrum.
- `layer_sizes`: `layer_sizes`, the shapes of the layers of a model or a checkpoint.
- `pruning_ratios`: `pruning_ratios`, the share of each layer to prune (AlphaPruning).
- `scores`: `Scores`, the score and the cost of every layer as a file.
- `scoring`: `layer_scores`, the scores of a model; `ScoringConfig`, the options.
- `assignment`: `assign_layers`, which device takes which run of layers; `total_value`.
- `dynamic_program`: the exact solution of the assignment.
- `integer_program`: a bound and a solution for assignments too large for the exact one.
- `objectives`: `ASSIGNMENT_OBJECTIVES`, the values that an assignment can maximise; `budget_cases`, budgets to compare them on.
"""
