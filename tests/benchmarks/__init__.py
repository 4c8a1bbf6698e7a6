"""What measures us beside rivals, or tests what the README claims: each file is a program of its own.

`make bench-population ARGS="--network resnet50"` runs one, and so does
`python -m tests.benchmarks.population`; `--help` says what it takes. They need the development tools
(`make install`), and nobody installs them.
"""
