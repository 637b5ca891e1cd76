"""How fast train_cifar100.py is alone on this machine's cores, and beside a busy loop for each of two, with libgomp's waiting
as it is by itself and as training/process.py has it:

    python tests/other_programs.py [--rounds 5] [--spin-counts 1000,100000]

The fair share beside as many busy loops as cores is half of the speed alone. Each figure is the median of the rounds, which
take turns, so that a machine that slows down does so for all. Run it with nothing else running.
"""
import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from training.process import SPIN_COUNT  # noqa: E402

COMMAND = ["--sample", "--width", "0.5", "--image-size", "16", "--epochs", "2", "--set", "progressive=none", "--device", "cpu",
           "--overlay-every", "0"]
WAITS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def images_per_second(waiting: dict[str, str]) -> float:
    environment = {name: value for name, value in os.environ.items() if name not in WAITS} | waiting
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, ROOT / "train_cifar100.py", *COMMAND, "--run-dir", f"{folder}/run"], env=environment,
                       check=True, stdout=subprocess.DEVNULL)
        with open(f"{folder}/run/metrics.csv", newline="") as file:
            return float(list(csv.DictReader(file))[-1]["images_per_second"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--spin-counts", default="", help="others to try, with commas between")
    args = parser.parse_args()
    # 300000 is what libgomp takes by itself; the scripts leave alone what is set.
    counts = ["300000", SPIN_COUNT, *filter(None, args.spin_counts.split(","))]
    settings = {f"GOMP_SPINCOUNT={count}": {"GOMP_SPINCOUNT": count} for count in counts}
    settings["OMP_WAIT_POLICY=passive"] = {"OMP_WAIT_POLICY": "passive"}
    rates = {(name, loops): [] for name in settings for loops in (0, 2)}
    for _ in range(args.rounds):
        for loops in (0, 2):
            others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
            try:
                for name, waiting in settings.items():
                    rates[name, loops].append(images_per_second(waiting))
            finally:
                for other in others:
                    other.kill()
    alone = statistics.median(rates["GOMP_SPINCOUNT=300000", 0])
    print(f"{'images/s':<26} {'alone':>7} {'of before':>10} {'beside two loops':>17} {'of the fair share':>18}   all of them")
    for name in settings:
        free, busy = (statistics.median(rates[name, loops]) for loops in (0, 2))
        print(f"{name:<26} {free:7.0f} {100 * free / alone:8.0f} % {busy:17.0f} {100 * busy / (alone / 2):16.0f} %   "
              f"{[[round(rate) for rate in rates[name, loops]] for loops in (0, 2)]}")


if __name__ == "__main__":
    main()
