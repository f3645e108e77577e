"""The command line: train a recipe, sample from a checkpoint, evaluate one. An error is one line and exit code 1."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torchvision.utils import save_image

from .checkpoints import SaveCheckpoints, checkpoints_by_progress
from .config import Config, nearest_name, parse_fields, prepare_file
from .engine import or_warn
from .evaluation import EvaluateEachEpoch
from .history import DivergenceError
from .recipes import GAN, RECIPES


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and return its exit code."""
    options = command_line().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):  # a terminal without emoji shows '?' rather than end the training
        getattr(stream, "reconfigure", lambda **_: None)(errors="replace")
    try:
        if empty := [name for name, value in vars(options).items() if value == ""]:
            raise ValueError(f"--{empty[0]} is empty")
        with process_group():
            options.run(options)
    except (ValueError, OSError, ImportError, MemoryError, OverflowError, RuntimeError, TypeError) as error:
        too_large = re.search("memory|overflow", str(error), re.IGNORECASE)  # torch raises all kinds for it
        if isinstance(error, RuntimeError | TypeError) and not isinstance(error, DivergenceError) and not too_large:
            raise
        print(f"error: {str(error).partition(chr(10))[0] or type(error).__name__}", file=sys.stderr)
        return 1
    return 0


def command_line() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(prog="dcgan_utils.py", description="Train DCGANs, sample from and evaluate them.")
    commands = parser.add_subparsers(required=True)
    train = commands.add_parser("train", help="train a recipe, or go on")
    train.add_argument("--recipe", help=f"one of {', '.join(RECIPES)} (default: fast, or that of the resumed run)")
    train.add_argument("--epochs", type=int, help="in all, those of a resumed run included (default: the recipe's)")
    train.add_argument("--max-seconds", type=float, help="stop after so many seconds")
    train.add_argument("--data", help="mnist (default), another data set by name, or a folder or file of images")
    train.add_argument("--out", default="outputs", help="folder of checkpoints and pictures (default: outputs)")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    train.add_argument("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE", help="Config fields")
    sample = commands.add_parser("sample", help="write samples as a NumPy file or as pictures")
    sample.add_argument("--n", type=int, default=64, help="how many (default: 64)")
    sample.add_argument("--seed", type=int, help="the same seed gives the same samples")
    sample.add_argument("--digits", type=int, nargs="+", help="conditional recipes: one digit, or one for each sample")
    sample.add_argument("--out", required=True, help="NAME.npz, NAME.png for a grid, or FOLDER/ for a PNG each")
    evaluate = commands.add_parser("evaluate", help="score samples beside real images")
    evaluate.add_argument("--data", help="what to compare with (default: what it was trained on)")
    evaluate.add_argument("--n", type=int, default=10_000, help="how many samples (default: 10000)")
    evaluate.add_argument("--json", help="also write the scores into this file")
    for command, run in ((train, train_command), (sample, sample_command), (evaluate, evaluate_command)):
        command.set_defaults(run=run)
        if command is not train:
            command.add_argument("--checkpoint", required=True, help="a checkpoint, or a folder of them")
    return parser


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that `torchrun` started (gloo on CPU, NCCL on GPUs); only the first one prints."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if torch.cuda.is_available():
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"  # it would look at events while a CUDA graph is recorded
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")  # device=cpu works, too
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if dist.get_rank() else sys.stdout):
            yield
    finally:
        dist.destroy_process_group()


def train_command(options: argparse.Namespace) -> None:
    """Train or resume, with a checkpoint after every epoch; raises OSError where the last one could not be saved."""
    if options.recipe is not None and options.recipe not in RECIPES:
        raise ValueError(f"no recipe {options.recipe!r}{nearest_name(options.recipe, list(RECIPES))}")
    fields = {"out_dir": options.out, **parse_fields(options.set)}
    if unknown := [name for name in fields if name not in vars(Config())]:
        raise ValueError(f"Config has no field {unknown[0]!r}{nearest_name(unknown[0], list(vars(Config())))}")
    if options.epochs is not None:
        fields["num_epochs"] = options.epochs
    found = checkpoints_by_progress(options.out)
    if found and not options.resume:
        raise ValueError(f"{options.out} already holds checkpoints; add --resume, or choose another --out")
    if options.resume:
        gan = RECIPES.get(options.recipe or "", GAN).load(found[-1] if found else options.out, **fields)
    else:
        gan = RECIPES[options.recipe or "fast"](**fields)
    run = f"{gan.config.num_epochs} epochs on {gan.device}, {gan.precision}, seed {gan.config.seed}"
    print(f"{type(gan).__name__}: {run}")
    callbacks = [SaveCheckpoints(options.out), *gan.default_callbacks()]  # a report that fails costs no checkpoint
    callbacks.sort(key=lambda callback: not isinstance(callback, EvaluateEachEpoch))  # it saves what they have scored
    gan.train(data=options.data, max_seconds=options.max_seconds, callbacks=callbacks)
    if gan.history["epoch"] and gan.rank == 0:
        with or_warn("the last grid"):
            gan.generate_images("FINAL")
        print(f"checkpoint: {gan.last_checkpoint}   pictures: {gan.folder}")


def sample_command(options: argparse.Namespace) -> None:
    """Write n samples: arrays of images float32 (n, C, H, W) in [-1, 1] and digits (n,), or one or n pictures."""
    out, gan = Path(options.out), GAN.load(options.checkpoint)
    folder = out.is_dir() or options.out.endswith(("/", os.sep))
    kinds = ("", ".npz", ".png") if gan.config.channels in (1, 3) else ("", ".npz")
    if out.suffix not in kinds and not folder:
        raise ValueError(f"--out {options.out} names no file of a kind that can be written: .npz, .png, or FOLDER/")
    images, labels = gan.sample(options.n, options.seed, options.digits), gan.class_labels(options.n, options.digits)
    if folder:
        for index, image in enumerate(images):
            name = f"{index:05d}.png" if labels is None else f"{index:05d}_{labels[index]}.png"
            save_image(image, prepare_file(out / name), normalize=True, value_range=(-1, 1))
    elif out.suffix == ".png":
        save_image(images, prepare_file(out), nrow=round(options.n**0.5), normalize=True, value_range=(-1, 1))
    else:
        out, digits = out.with_suffix(".npz"), {} if labels is None else {"digits": labels.cpu().numpy()}
        np.savez_compressed(prepare_file(out), images=images.numpy(), **digits)
    print(f"{options.n} images of {images.shape[2]}×{images.shape[3]} in {out}")


def evaluate_command(options: argparse.Namespace) -> None:
    """Print the scores of n samples beside those of real images."""
    gan = GAN.load(options.checkpoint)
    if options.data is not None:
        gan.set_data(options.data)
    scores = gan.evaluate(options.n)
    print(scores)
    if options.json is not None:
        prepare_file(options.json).write_text(json.dumps(scores, indent=1) + "\n")
