"""Feeds odd input to what takes input from outside. `make fuzz`; the exit code says whether anything was found.

gguf        GGUF headers: kvcast's own check, `kvcast inspect`, llama.cpp
predictor   networks, by ONNX Runtime and by what follows a prediction, and their cards
session     documents on disk
server      requests to `kvcast serve`
grammar     grammars and JSON schemas, followed by a model that says anything

A case is made from the seed and its number. The input of one that crashes, hangs or ends in an exception that is not kvcast's own is
kept in --out; --repeat FILE runs it again in this process.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from fuzzing.gguf_file import GgufHeader
from fuzzing.grammar import Grammar
from fuzzing.harness import fuzz
from fuzzing.predictor import Predictor
from fuzzing.server import Server
from fuzzing.session import Session

ROOT = Path(__file__).resolve().parent.parent
SURFACES = {"gguf": GgufHeader, "predictor": Predictor, "session": Session, "server": Server, "grammar": Grammar}
N_CASES = {"gguf": 60000, "predictor": 60000, "session": 40000, "server": 60000, "grammar": 80000}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--surface", choices=SURFACES, help="one only")
    parser.add_argument("--cases", type=int, help=f"of each surface; {', '.join(f'{n:,} of {name}' for name, n in N_CASES.items())}")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "fuzz", help="folder for the inputs of findings")
    parser.add_argument("--repeat", type=Path, metavar="FILE", help="run one input, of --surface")
    options = parser.parse_args()
    if options.repeat:
        if options.surface is None:
            parser.error("--repeat needs --surface")
        options.out.mkdir(parents=True, exist_ok=True)
        print(SURFACES[options.surface](options.out).run(options.repeat.read_bytes()))
        return 0
    n_found = 0
    for name in [options.surface] if options.surface else SURFACES:
        begin = time.monotonic()
        cases = range(options.first, options.first + (N_CASES[name] if options.cases is None else options.cases))
        report = fuzz(SURFACES[name], name, cases, options.seed, options.out)
        seen = ", ".join(f"{n:,} {outcome}" for outcome, n in report.outcomes.most_common())
        print(f"{name}: {len(cases):,} cases of seed {options.seed} in {time.monotonic() - begin:.0f} s: {seen}")
        for finding, n in report.findings.most_common():
            n_found += n
            print(f"  {n} x {finding}")
    return n_found > 0


if __name__ == "__main__":
    sys.exit(main())
