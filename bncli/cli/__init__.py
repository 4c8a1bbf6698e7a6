"""The command line: it loads, calls the library and renders. Only here are typer and rich known."""
