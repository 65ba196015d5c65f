"""Jobs of Slurm: a site's settings, the text of a batch script, Slurm's own commands, the states of jobs."""
