"""Work with any PyTorch model: find its layers, feed it a batch, replace layers, measure what it costs to run.

- `batches`: run a model on a batch of any form: a mapping, a pair (inputs, labels), a bare tensor.
- `autograd`: run and differentiate a model whatever mode of autograd the caller is in.
- `block_calls`: find the blocks that a model calls, in what order it calls layers, and run one block alone.
- `convertible`: find the layers that `usv` can replace.
- `dry_run`: try out replacing layers, before anything is replaced.
- `lazy_weight`: weights that are multiplied out only if somebody computes with them.
- `low_rank`: linear layers stored as two factors, or as pivot rows and coefficients (PIFA).
- `nested`: `NestedLinear`, factors at full rank, of which any rank can be cut.
- `nests`: reach the tensors in a nest of mappings, sequences and dataclasses.
- `offloaded`: models whose weights accelerate keeps on the CPU or on disk until a layer is called.
- `pivots`: choose the pivot rows of a low-rank matrix.
- `plain`: tell which layers compute x W^T + b from parameters of their own, and why others do not.
- `profiling`: measure time, memory and floating-point operations.
- `quantized`: `QuantizedLinear`, linear layers with weights of 8 or 4 bits.
- `remembering`: run a model once on batches that come again.
- `residuals`: find the layers of a block whose output is added to hidden states.
- `skeletons`: build an architecture without memory, however large its description says it is.
- `surgery`: replace layers, split packed projections, turn `Conv1D` layers into linear ones.
- `targets`: find layers by name or pattern.
- `token_masks`: read masks of every form, and find the inputs that a mask belongs to.
- `usv`: linear and convolutional layers with fixed bases and a trained core (OIALR).
"""
