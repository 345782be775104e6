"""Turn notebooks into results: parameters, runner, tables, README and site. It imports `lowrank.io` and no model code.

- `__main__`: the command line, `python -m lowrank.report`.
- `parameters`: parameter sets, and the parameters of a notebook in one set.
- `resources`: memory, time and processors that a notebook needs, for a cluster.
- `yaml_files`: YAML files in which no key appears twice.
- `folders`: the folder of published results, and that of your own runs.
- `namespace`: check the parameters that a notebook runs with, and name the folder of their results.
- `errors`: errors that a command reports in one line.
- `notebook`: `Report`, which a notebook uses to write its figures, tables, claims and run.json.
- `findings`: claims and readings of each notebook, as functions of its tables.
- `inference`: paired differences to effects with intervals, and verdicts.
- `agreement`: whether the verdicts and printed numbers of two runs agree.
- `style`: how figures look.
- `run`: execute one notebook with one set.
- `progress`: a line per section of a running notebook, where there is no terminal.
- `pair`: execute notebooks with their defaults and store them beside their sources.
- `portable`: remove what ties an executed notebook to one machine.
- `compare`: compare the results of a run with published ones.
- `publish`: put the results of a run in the place of published ones.
- `readme`: fill the marked blocks of the README and of docs/.
- `model_tables`: the tables of pretrained models.
- `tables`: the tables of notebooks 01 to 05 and 07 for those blocks.
- `selection_tables`: the tables of notebook 06.
- `bench_tables`: the tables of `make bench`, with the costs of large models.
- `site`: build the site.
- `result_files`: the files of one folder of results, each checked.
- `pages`: the page of one executed notebook, and Markdown helpers.
- `reference`: the pages of the reference, from docstrings.
"""
