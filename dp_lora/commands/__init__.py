"""One command per module: it resolves configuration and inputs, opens the tracked run, and calls the code of the work.

A module here imports nothing heavy at its head (tests/test_startup.py): torch and the like are imported where the work
begins, so that help and refusals come at once.
"""
