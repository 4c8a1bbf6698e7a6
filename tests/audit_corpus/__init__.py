"""A corpus of checkpoints, healthy and ill, and what `bncli inspect-stats` makes of each.

    python -m tests.audit_corpus [--out DIR] [--json] [--only GLOB]

Every file is made here, from seeds: nothing is downloaded. bncli is asked through its command line alone, so
that the same corpus judges any version of it. The table counts false alarms and misses.
"""
