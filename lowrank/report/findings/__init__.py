"""What the notebooks find: claims and readings, as functions of the tables of one folder of results.

- `results`: `Results`, which reads the tables; `Claim`, and the table that claims make together.
- `whitening`, `preparation`, `compression`, `stability`, `adapters`, `selection`, `geometry`: those of notebooks 01 to 07.
- `recompute`: judges published results anew.
- `registry`: which module belongs to which notebook.

A claim or a sentence that changes needs no notebook to run again: `python -m lowrank.report claims`.
"""
