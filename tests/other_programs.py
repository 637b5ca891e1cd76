"""How fast the training step is alone on this machine's cores, and beside a busy loop for each of
them, with libgomp's waiting as it is by itself and as common/process.py has it:

    python tests/other_programs.py [--rounds 4] [--spin-counts 10000,100000]

The fair share beside as many busy loops as cores is half of the speed alone. In each round every
setting gets a process of its own, in turns that are reversed in every second round; it times 5
windows alone and 8 beside new loops, as it depends on the cores that the system puts them on.
Figures are medians over all windows. Run it with nothing else running.
"""

import argparse
import ast
import itertools
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common.device import tune_malloc  # noqa: E402 - once the path is set
from common.process import SPIN_COUNT  # noqa: E402 - the same

RUN = "--sample --width 0.5 --image-size 16 --set progressive=none --device cpu".split()
WAITS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def windows() -> list[list[float]]:
    """Images a second of each window alone, and of each beside the loops."""
    from train_cifar100 import TASK
    from training import benchmark, options
    from training.run import Run

    tune_malloc()
    config = options.resolve(options.make_parser(TASK).parse_args(RUN), TASK)
    trainer = Run(TASK, config, Path("."), *TASK.data.sample(config)).trainer
    batches = benchmark.cycle(map(trainer.batches.epoch, itertools.count()))

    def rate(seconds: float) -> float:
        steps, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            trainer.step(*next(batches))
            steps += 1
        return steps * config["batch_size"] / (time.perf_counter() - began)

    rate(2)
    alone, beside = [rate(3) for _ in range(5)], []
    for _ in range(8):
        loops = [
            subprocess.Popen([sys.executable, "-c", "while True: pass"])
            for _ in range(os.cpu_count())
        ]
        time.sleep(0.5)
        beside.append(rate(4))
        for busy in loops:
            busy.kill()
            busy.wait()
    return [alone, beside]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--spin-counts", default="", help="others to try, with commas between")
    # a process of its own
    parser.add_argument("--windows", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.windows:
        print(windows())
        return
    # the first is libgomp's own
    counts = ["300000", SPIN_COUNT, *filter(None, args.spin_counts.split(","))]
    settings = {f"GOMP_SPINCOUNT={count}": {"GOMP_SPINCOUNT": count} for count in counts}
    settings["OMP_WAIT_POLICY=passive"] = {"OMP_WAIT_POLICY": "passive"}
    rates = {name: ([], []) for name in settings}
    for number in range(args.rounds):
        for name, waiting in list(settings.items())[:: -1 if number % 2 else 1]:
            environment = {
                key: value for key, value in os.environ.items() if key not in WAITS
            } | waiting
            done = subprocess.run(
                [sys.executable, __file__, "--windows"],
                env=environment,
                check=True,
                capture_output=True,
                text=True,
            )
            for all_of_them, some in zip(rates[name], ast.literal_eval(done.stdout), strict=True):
                all_of_them += some
    before = statistics.median(rates["GOMP_SPINCOUNT=300000"][0])
    print(
        f"{'images/s':<26} {'alone':>6} {'of the first':>13} {'beside loops':>13} "
        f"{'of the fair share':>18} {'least':>6} "
        f"{'most':>6}"
    )
    for name, (alone, beside) in rates.items():
        free, busy = statistics.median(alone), statistics.median(beside)
        print(
            f"{name:<26} {free:6.0f} {100 * free / before:11.1f} % {busy:13.0f} "
            f"{100 * busy / (before / 2):16.0f} % "
            f"{min(beside):6.0f} {max(beside):6.0f}"
        )


if __name__ == "__main__":
    main()
