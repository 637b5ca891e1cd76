"""The experiments behind docs/attention.md.

python -m experiments run --data-dir data      every run and measure that is missing
python -m experiments maps RUN/last.pt         accuracy with other attention maps
python -m experiments transfer RUN/last.pt     accuracy of a linear classifier on other classes
python -m experiments tables                   the tables of docs/attention.md, from the files
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from common.process import settle

    settle()  # before PyTorch is loaded

import argparse
from collections.abc import Sequence
from pathlib import Path

from common.arguments import ArgumentParser, expanded_path, int_at_least, parse, positive
from common.errors import exit_status
from experiments import plan, replaced_maps, tables, transfer
from experiments.checkpoints import load_trained, write_record

REFERENCE = "runs/reference/experiments"


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m experiments", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str, act: object) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(act=act)
        return command

    run = add("run", "every run and measure that is missing", run_plan)
    run.add_argument("--runs", type=expanded_path, default="runs/experiments", help="their folder")
    run.add_argument("--width", type=positive(16), default=0.25, help="factor on all channels")
    run.add_argument("--epochs", type=int_at_least(1), default=5, help="of each run")
    run.add_argument("--jobs", type=int_at_least(1), default=1, help="runs at the same time")
    run.add_argument(
        "--keep",
        type=expanded_path,
        metavar="FOLDER",
        help=f"copy the small files of the finished runs there, as in {REFERENCE}",
    )
    maps = add("maps", "accuracy with other attention maps", measure_maps)
    other = add("transfer", "accuracy of a linear classifier on other classes", measure_transfer)
    for command in (maps, other):
        command.add_argument("checkpoint", metavar="CHECKPOINT", type=expanded_path)
        command.add_argument("--device", default="auto", help="auto, cpu, cuda, or cuda:N")
    for command in (run, maps, other):
        command.add_argument(
            "--data-dir", type=expanded_path, default="data", help="folder of the images"
        )
    write = add("tables", "the tables of a document, from the files of the runs", write_tables)
    write.add_argument("--runs", type=expanded_path, default=REFERENCE, help="their folder")
    write.add_argument("--document", type=expanded_path, default="docs/attention.md")
    return parser


def run_plan(args: argparse.Namespace) -> int:
    folder = Path(args.runs)
    options = ("--width", f"{args.width:g}", "--epochs", str(args.epochs))
    failed = plan.run_all(folder, args.data_dir, (*options, *plan.COMMON), args.jobs)
    if args.keep:
        print(f"{plan.keep(folder, Path(args.keep))} runs in {args.keep}")
    return min(failed, 1)


def measure_maps(args: argparse.Namespace) -> int:
    trained = load_trained(args.checkpoint, args.device)
    _, test = trained.sets(args.data_dir)
    found = replaced_maps.measure(trained.model, lambda: trained.batches(test), trained.precision)
    print(f"{write_record(trained, plan.MAPS, found)}: top-1 {found['top1']:.2f} %")
    for row in found["replaced"]:
        print(f"{row['of']:<7} {row['by']:<12} {row['top1']:6.2f} %")
    return 0


def measure_transfer(args: argparse.Namespace) -> int:
    trained = load_trained(args.checkpoint, args.device)
    found = transfer.transfer_all(trained, args.data_dir)
    print(write_record(trained, plan.TRANSFER, {"targets": found}))
    for row in found:
        print(f"{row['target']}, {row['image_size']} px: {row['top1']:.2f} %")
    return 0


def write_tables(args: argparse.Namespace) -> int:
    document = Path(args.document)
    text = tables.filled(document.read_text(), tables.read_runs(Path(args.runs)))
    document.write_text(text)
    print(f"{document}: written")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(make_parser(), list(sys.argv[1:] if argv is None else argv))
    with exit_status("Stopped.") as status:
        status.code = args.act(args)
    return status.code


if __name__ == "__main__":
    sys.exit(main())
