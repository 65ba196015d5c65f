"""Studies and measurements that are too long for tests; each has a make target."""
