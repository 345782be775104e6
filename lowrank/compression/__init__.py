"""Compress whole models: in one call or step by step, then fold, save and load them; prune weights.

- `compress`: `compress`, the one call: statistics, ranks within a budget, factored layers.
- `configuration`: `Configuration`, how to compress: method, storage, centring, allocation of ranks, retargeting.
- `replace`: the strict steps: `decompose`, `replace_layers` at given ranks, `fold` back to dense layers.
- `allocation`: `choose_ranks`, the rules that choose ranks within a budget, and `RULES`, their names.
- `allocator`: `Allocator`, what the rules ask about a model, computed once.
- `nested`: `nest_layers`, factors at full rank, and `cut_layers`, which cuts them to any size later.
- `quantize`: `quantize`, weights of 8 or 4 bits.
- `depth`: how much the errors of a block count by its place in the model.
- `retarget`: `retarget_layers`, each layer repairs what the compressed ones in front of it have changed.
- `streams`: the hidden states of the dense and the compressed model, from block to block.
- `block_folder`: the finished blocks of a retargeted model on disk, to go on after a stop.
- `result`: `CompressionResult`, what a compression did, and `parameter_counts`.
- `checks`: what can be wrong, found before a model is changed.
- `checkpoint`: `save_compressed` and `load_compressed`, a folder with safetensors and a JSON record.
- `model_folder`: the files of that folder.
- `pretrained`: what `from_pretrained` of transformers finds in it.
- `quantizer`: what transformers calls to load and save such models.
- `card`: `format_card`, the record of a compressed model as a model card.
- `push`: `push_compressed`, a folder to the Hub.
- `rebuild`: `plan_build`, how a model is built again, verified by shapes and outputs.
- `bases`: how the dense architecture is described and built again without its weights.
- `architecture`: the layers that differ from the dense ones, described and put in.
- `probes`: the outputs of a model for a fixed input, and how they differ from those of another.
- `stored_state`: what a file holds besides plain tensors: extra state, and buffers that no state has.
- `description`: `describe_folder`, what such a folder holds, without building the model.
- `record_schema`: the fields of that JSON record.
- `pruning`: `prune` by magnitude or Wanda, to exact counts, per row, per matrix or n:m.
"""
