"""Shared code of the tests: tiny models, data and projects, servers, and the processes that tests start; no tests."""
