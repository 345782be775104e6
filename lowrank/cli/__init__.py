"""The `lowrank` command: `lowrank COMMAND`, or `python -m lowrank COMMAND`.

Each command is a module with `add(parser)`, its options, and `run(options)`, which returns the exit status. Its docstring is its
help. Commands import what they need when they run, so that help comes at once.

- `main`: `COMMANDS`, the list of them, and the function that runs one.
- `options`: options that several commands share.
- `output`: results as tables or as JSON.
- `compress`: compress a model, and write it to a folder.
- `evaluate`: measure a model on a data set or by lm-evaluation-harness.
- `info`: say what a folder with a compressed model holds.
- `files`: checks of the file or folder that a command writes.
- `ranks`: LoRA ranks from two checkpoints.
- `score`: score layers by their spectra; `assign`: give them to devices with budgets.
- `prune`: set weights to zero, and write the model to a folder.
- `params`: the parameters of a notebook as a flat file; `run`: execute it.
"""
