"""Hostile requests and hostile adapters against a real server: each answered once, rightly or with a refusal.

    python bench/hostile.py --requests 10000 --seed 0
    python bench/hostile.py --requests 0 --adapters 1000
    python bench/hostile.py --only 4711

The requests come from a seeded grammar (wrong types, shapes, parameters, names, text, HTTP, cancelled calls;
over /infer, /generate, /generate_stream and gRPC, to both models), among them some whose answers PEFT has
given. The adapters are seeded mutations of a sound one. At the end the server must be the one it was: the
same processes, an empty queue, `check()` clean, no traceback in its log. Ends with status 1 if anything is
wrong.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from manylora.serve.background import RunningServer, running_server
from tqdm import tqdm

from bench.arguments import add_base_model, add_save, make_parser
from bench.campaigns.harness import Peft, Wanted, silence_libraries
from bench.campaigns.hostile import campaign
from bench.campaigns.hostile.adapters import write_mutants
from bench.campaigns.hostile.grammar import Grammar
from bench.loadtest.csv_file import append_csv
from bench.loadtest.origin import Origin
from bench.paths import RESULTS, ROOT

TRAINED = ROOT / "examples" / "adapters"
MAX_SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(Origin):
    """One part of a run, as bench/results/hostile.csv keeps it."""

    seed: int
    cases: int
    kinds: int
    """Of requests, or of mutations."""
    ends: str
    """How the cases ended, most frequent first."""
    faults: int
    """Cases that were answered wrongly, twice or never."""
    server_faults: int
    """What is wrong with the server afterwards."""


def main() -> None:
    args = parse_arguments()
    silence_libraries()
    names = sorted(path.name for path in TRAINED.iterdir())
    with tempfile.TemporaryDirectory() as folder:
        adapter_root = Path(folder)
        shutil.copytree(TRAINED, adapter_root, dirs_exist_ok=True)
        prompts, answers = campaign.known_answers(Peft(args.base_model, adapter_root), names)
        grammar = Grammar(args.seed, prompts)
        if args.show:
            for index in args.only:
                print(grammar.case(index))
            return
        mutants = write_mutants(adapter_root, args.seed, args.adapters)
        with running_server(
            base_model=args.base_model, adapter_root=adapter_root, arguments=campaign.SETTINGS
        ) as server:
            faults = run_requests(server, grammar, answers, args)
            if mutants:
                origin = Origin.now("adapters")
                with progress(2 * len(mutants), "adapters") as bar:
                    result = campaign.run_adapters(server, list(mutants), prompts, answers, bar.update)
                faults += report(result, mutants)
                if args.save:
                    save(result, origin, args.seed, len(set(mutants.values())))
    sys.exit(1 if faults else 0)


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_base_model(parser)
    parser.add_argument("--requests", type=int, default=10_000, help="cases of the grammar")
    parser.add_argument("--adapters", type=int, default=0, help="mutated adapters")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+", help="send just the cases of these numbers")
    parser.add_argument("--show", action="store_true", help="print the cases of --only and send nothing")
    add_save(parser, "hostile", "a row")
    args = parser.parse_args()
    if args.show and not args.only:
        parser.error("--show prints what --only names")
    return args


def run_requests(
    server: RunningServer, grammar: Grammar, answers: list[Wanted], args: argparse.Namespace
) -> int:
    indices = args.only or range(args.requests)
    if not indices:
        return 0
    origin = Origin.now("requests")
    with progress(len(indices), "requests") as bar:
        result = campaign.run(server, map(grammar.case, indices), answers, bar.update)
    if args.save:
        save(result, origin, args.seed, len(result.num_cases))
    return report(result, {}, f"--seed {args.seed} ")


def progress(total: int, unit: str) -> Any:
    # Quiet where nobody watches.
    return tqdm(total=total, unit=f" {unit}", disable=None, smoothing=0.05)


def report(result: campaign.Result, mutants: dict[str, str], options: str = "") -> int:
    """Print what was met; return how much of it is wrong.

    Args:
        mutants: what was done to each mutated adapter, by name.
        options: of this command, to run one case again.
    """
    ends = result.ends
    if mutants:
        ends = {}
        for kind, counts in result.ends.items():
            by_kind = mutants.get(kind.removeprefix("adapter "), "sound, and known")
            ends.setdefault(by_kind, Counter()).update(counts)
    print(f"\n{'kind':<22}{'cases':>7}  ends")
    for kind, counts in sorted(ends.items()):
        words = ", ".join(f"{count} {end}" for end, count in counts.most_common())
        print(f"{kind:<22}{counts.total():>7}  {words}")
    for fault in result.faults[:MAX_SHOWN]:
        print(f"\nFAULT in case {fault.case.index} ({fault.case.kind}): {fault.what}")
        print(f"  {str(fault.case.wire)[:1000]}")
        if options:
            print(f"  again: python bench/hostile.py {options}--only {fault.case.index}")
    for server_fault in result.server_faults:
        print(f"\nFAULT of the server: {server_fault}")
    num_faults = len(result.faults) + len(result.server_faults)
    print(f"\n{sum(result.num_cases.values())} cases, {num_faults} faults")
    return num_faults


def save(result: campaign.Result, origin: Origin, seed: int, num_kinds: int) -> None:
    """Append a row to bench/results/hostile.csv."""
    ends: Counter[str] = sum(result.ends.values(), Counter())
    row = Row(
        **asdict(origin),
        seed=seed,
        cases=sum(result.num_cases.values()),
        kinds=num_kinds,
        ends=", ".join(f"{count} {end}" for end, count in ends.most_common()),
        faults=len(result.faults),
        server_faults=len(result.server_faults),
    )
    append_csv(RESULTS / "hostile.csv", [row])


if __name__ == "__main__":
    main()
