"""Evaluation: prompts drawn by several systems, scored, and compared by statistics that say what a difference is worth.

`suites` are the prompts, `systems` what draws them, `run` draws, `measure` scores, `statistics` compares.
"""
