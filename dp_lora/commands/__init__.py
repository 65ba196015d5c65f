"""One command a module: it resolves configuration and inputs, opens the tracked run, and calls what does the work.

A module here imports nothing heavy at its head (tests/test_startup.py): torch and the rest are imported where the work
begins, so that help and refusals come at once.
"""
