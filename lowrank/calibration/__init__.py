"""Turn calibration data into the statistics of layers.

- `collect`: `collect_statistics`, one pass over the data.
- `collector`: the running sums during that pass.
- `backward`: the gradients at the outputs of layers, from one backward pass.
- `sharing`: `SharedInputs`, the sums of inputs, once for all layers that receive them.
- `padding`: `Padding`, which rows of a layer are tokens, whatever sequence of a batch it sees.
- `skip_head`: `SkipHead`, leave a pass before the output head.
- `on_demand`: `OnDemand`, statistics that are collected one block of layers at a time, to save memory.
- `predictive_loss`: a loss that needs no labels, for the gradients at the outputs.
- `divergence`: how far the predictions of a model are from those of the dense one.
- `hooks`: see the inputs of layers during a pass.
- `output_error`: the output error of replaced weights, measured without second moments.
- `storage`: statistics as a file, and their hash.
"""
