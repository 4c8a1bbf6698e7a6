"""One file per file format; nothing in a file is ever executed."""
