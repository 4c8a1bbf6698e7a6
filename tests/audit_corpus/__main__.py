"""The table. Exits with 1 where there is a false alarm, or a miss that is not expected."""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.audit_corpus.corpus import find_cases, run
from tests.audit_corpus.table import as_json, as_text, summarize


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.audit_corpus", description=__doc__)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="keep the files here; those that lie there are used"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--only", metavar="NAME", help="cases whose name has this text or matches this glob")
    options = parser.parse_args()
    cases = find_cases(options.only)
    if not cases:
        parser.error(f"no case is called {options.only!r}")
    with tempfile.TemporaryDirectory() as place:
        verdicts = run(cases, options.out or Path(place), report=lambda line: print(line, file=sys.stderr))
    print(as_json(verdicts) if options.json else as_text(verdicts))
    sums = summarize(verdicts)
    return int(any(sums[f"num_{kind}"] for kind in ("false_errors", "false_warnings", "misses")))


if __name__ == "__main__":
    sys.exit(main())
