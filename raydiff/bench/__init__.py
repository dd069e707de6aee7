"""Sample efficiency: what each method needs, in reward queries, pictures and passes of the denoiser, to reach the same
held-out reward on the same model, prompts and seeds.

`settings` says what is compared, `measure` makes one run, `curves` has the statistics, `report` the tables and figures.
"""
