"""One file per command: it reads what was asked, calls the library and shows the result."""
