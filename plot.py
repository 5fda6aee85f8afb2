"""CSV logs -> figures: one panel a metric, one line a run, mean and ±1 std band over the seeds of a run.

Files NAME-s0.csv, NAME-s1.csv … are the seeds of one run. Empty cells were not measured: they are skipped.
Without --output a window opens where there is a display; elsewhere a PNG lands beside the first CSV.
Run: python plot.py --metric mean_r logs/grpo.csv logs/ppo.csv
"""
from dataclasses import dataclass

import tyro

from utils.cli import at_least, die, parse
from utils.figure import GRID, plot_panels


@dataclass
class Args:
    files: tyro.conf.Positional[tuple[str, ...]] = ()  # CSVs; NAME-s0.csv, NAME-s1.csv … are one run
    metric: str = "mean_r"  # a column, or several (mean_r,gold): a panel each
    x: str = "step"  # step, samples, tokens, seconds, or any other column, such as kl
    smooth: int = 1  # moving average of the last N measured values
    grid: bool = False  # instead of --metric: reward, gold score, KL, entropy, loss, length
    output: str = ""  # where to write the figure: .png, .pdf or .svg
    dpi: int = 150  # dots per inch of a PNG


def main(args):
    at_least(args, smooth=1)
    if not 20 <= args.dpi <= 600:
        die(f"--dpi {args.dpi}: wanted 20 to 600")
    if args.grid and args.metric != "mean_r":
        die(f"--grid draws {', '.join(GRID)}: leave out --grid or --metric {args.metric}")
    metrics = GRID if args.grid else args.metric
    path = plot_panels(args.files, metrics, args.output, args.x, args.smooth, args.dpi, args.grid)
    if path:
        print(path)


if __name__ == "__main__":
    main(parse(Args))
