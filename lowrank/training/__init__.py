"""Train models: one loop for every training, and the methods that train before, during and after a compression.

- `loop`: `fit`, the one training loop, with its `Recipe` and its `Hooks`.
- `saved_states`: save a training whole or not at all, and resume it.
- `prehab`: PREHAB, training that prepares a model for truncation.
- `prehab_loss`: its loss, the loss of the task plus a rank penalty.
- `penalties`: differentiable penalties on the rank of a matrix.
- `whitened_linear`: linear layers trained in whitened coordinates.
- `oialr`: OIALR, training with fixed bases and falling ranks.
- `rank_cut`: the rule by which its ranks fall.
- `optimizer_state`: moments of an optimiser in new coordinates.
- `stability`: how much the bases of weights rotate during a training.
- `refine`: train the factors of a compressed model, by LoRA or directly.
"""
