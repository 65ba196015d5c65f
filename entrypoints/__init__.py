"""One thin command per entry point: parse, resolve, call one function, track."""
