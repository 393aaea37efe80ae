"""Runs experiments: tasks claimed from a folder, records in JSON lines, a verdict.

- experiment.py: what an experiment consists of.
- outcome.py: HELD, NOT HELD or UNDECIDED, from values seed by seed.
- folder.py: one sweep on disk: tasks, claims, records.
- provenance.py: by what code, versions and machine a record was made.
- worker.py: the loop that claims tasks and runs them, started any number of times.
- launch.py: starts workers here, on SLURM or on Ray, and shows how far they are.
- conclude.py: verdict, table and figure of the records of a sweep.
- publish.py: the records and figures in the repository, the tables of the READMEs.
- page.py: all experiments on one page of HTML.
"""
