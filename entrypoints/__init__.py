"""One thin command per entry point: parse, resolve, call one function, track."""

import os

# before torch is imported: threads that wait by spinning take the cores from whoever shares the machine
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
