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
import signal
from collections.abc import Sequence
from pathlib import Path

from common.arguments import ArgumentParser, expanded_path, int_at_least, parse, positive
from common.checkpoint import read_checkpoint
from common.errors import exit_status, printable
from common.files import replace_file
from data import CIFAR100
from experiments import plan, replaced_maps, tables, transfer
from training.environment import command_line
from training.evaluate_checkpoint import open_checkpoint
from training.evaluation_files import has_key, json_bytes, record, write_file

REFERENCE = "runs/reference/experiments"
BIRD_SIZES = (32, 64)  # pixels: what the networks were trained on, and what birds need


class CommandParser(ArgumentParser):
    """The parser of one command, which knows the options that come near an unknown one."""

    def parse_known_args(self, args=None, namespace=None):  # as argparse asks a command's parser
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(self.describe_unknown(unknown))
        return parsed, unknown


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m experiments", description=(__doc__ or "").split("\n")[0]
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=CommandParser
    )

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
        command.add_argument(
            "--out", type=expanded_path, metavar="FOLDER", help="default: beside the checkpoint"
        )
    for command in (run, maps, other):
        command.add_argument("--device", default="auto", help="auto, cpu, cuda, or cuda:N")
        command.add_argument(
            "--data-dir",
            type=expanded_path,
            default="data",
            help="folder of CIFAR-100 and of the birds",
        )
    write = add("tables", "the tables of a document, from the files of the runs", write_tables)
    write.add_argument("--runs", type=expanded_path, default=REFERENCE, help="their folder")
    write.add_argument("--document", type=expanded_path, default="docs/attention.md")
    return parser


def run_plan(args: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the same as Ctrl-C
    folder, size = Path(args.runs), ("--width", f"{args.width:g}", "--epochs", str(args.epochs))
    failed = plan.run_all(folder, args.data_dir, size, args.device, args.jobs)
    if args.keep:
        print(f"{plan.keep(folder, Path(args.keep))} runs in {args.keep}")
    return min(failed, 1)


def measure_maps(args: argparse.Namespace) -> int:
    where = {"data_dir": args.data_dir}
    opened = open_checkpoint(CIFAR100, args.checkpoint, args.device, changes=where)
    found = replaced_maps.measure(opened.model, opened.batches, opened.precision)
    for row in found["replaced"]:
        print(f"{row['of']:<7} {row['by']:<12} {row['top1']:6.2f} %")
    write(args, plan.MAPS, record(opened, command_line(sys.argv[1:])), found, "replaced")
    return 0


def measure_transfer(args: argparse.Namespace) -> int:
    known = len(read_checkpoint(args.checkpoint)["class_names"])
    # the test images of half of the classes are in a folder of their own
    where = {} if known == plan.FIRST else {"data_dir": args.data_dir}
    opened = open_checkpoint(CIFAR100, args.checkpoint, args.device, changes=where)
    targets = [("birds", size) for size in BIRD_SIZES]
    if known == plan.FIRST:
        targets = [("cifar100-last", opened.saved["input_size"][0])]
    found = [
        transfer.transfer(opened.path, target, args.data_dir, size, opened.precision)
        for target, size in targets
    ]
    for row in found:
        print(f"{row['target']}, {row['image_size']} px: {row['top1']:.2f} %")
    how = record(opened, command_line(sys.argv[1:]))
    for name in ("data", "images", "classes"):  # of the run's own images
        del how[name]
    write(args, plan.TRANSFER, how, {"targets": found}, "targets")
    return 0


def write(args: argparse.Namespace, name: str, how: dict, found: dict, key: str) -> None:
    """Write what was found, and how; an earlier file of ours has this ``key``."""
    folder = Path(args.out or Path(args.checkpoint).parent)
    path = write_file(folder / name, json_bytes(how | found), has_key(key))
    print(f"Written to {printable(path)}")


def write_tables(args: argparse.Namespace) -> int:
    document, runs = Path(args.document), tables.read_runs(Path(args.runs))
    text = tables.filled(document.read_text(), runs)
    replace_file(document, lambda file: file.write(text.encode()))
    print(f"{printable(document)}: written")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(make_parser(), list(sys.argv[1:] if argv is None else argv))
    with exit_status("Stopped.") as status:
        status.code = args.act(args)
    return status.code


if __name__ == "__main__":
    sys.exit(main())
