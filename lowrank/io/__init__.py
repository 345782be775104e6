"""Read and write files, and say what a result depends on, without any knowledge of models.

- `files`: write a file or folder whole or not at all, and open safetensors files with clear errors.
- `records`: JSON files that carry the name and version of their format.
- `schemas`: check what a file holds against a schema, one per format, and name the field that breaks it.
- `weights`: the tensors of a checkpoint by name, from a folder, a file, the Hub or a model in memory.
- `tensor_places`: which tensors are one in memory, and which overlap.
- `hub`: models, tokenizers and data sets by Hub name, with errors that name the remedy.
- `network`: whether the Hub can be reached, and the cache alone if it cannot.
- `snapshots`: a folder from the Hub at a pinned revision, and one to the Hub in a single commit.
- `cache`: expensive results on disk, each under a hash of everything that determines it.
- `hashing`: hashes of weights, tensors, files and options.
- `dependencies`: the files of this package that a source file depends on, and a hash of their code.
- `provenance`: commit, versions, machine and peak memory of a run.
- `distributed`: count the processes of a distributed run and send values between them.
- `commands`: run the function of a command line, with errors in one line.
- `arguments`: check the arguments of a public function against its annotations.
- `checks`: check an argument in one line, with one form of message.
- `after_import`: import a module of this package once another library is imported.
- `patterns`: match names of modules with names or regular expressions.
"""
