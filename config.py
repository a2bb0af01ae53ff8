"""What can be set, and what --res and --model choose: the options of train.py and sample.py.

A field made by `flag` is an option of its own, --name; one made by `option` is set by
--set NAME=VALUE. Fields that may differ when a run is resumed are marked `may_change`.
"""
import os
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from cli import fail, flag, option, parse
from ranks import default_model, has_cuda
from schedule import SCHEDULES, height_width, mean_side
from unet import PAPER_TRAINING
from uvit import PRESETS, halvings_to, patch_levels


@dataclass
class Config:
    # Pictures
    data: str = flag("", "folder or .zip of pictures (default: flowers, drawn by a formula)",
                       may_change=True)
    res: str = flag("64", "size in pixels, 64 or 384x640 (height x width)")
    portrait: bool = flag(False, "turn upright pictures by 90 degrees and tell the network")
    flip: bool = flag(True, "mirror half of the pictures (default: yes)")
    follow_links: bool = option(False, "follow links that lead out of the folder of pictures",
                                may_change=True)
    text: str = flag("", "learn captions: bytes, or t5:NAME (default: learn classes)")
    text_length: int = option(128, "tokens of a caption", least=1, most=4096)
    # Network
    model: str | None = flag(None, "size of the network (default: laptop; base with CUDA "
                               "and --res over 64)", choices=tuple(PRESETS))
    architecture: str = option("uvit", "uvit or unet", choices=("uvit", "unet"))
    blocks_16: int | None = option(None, "transformer blocks; default: the model's", least=1,
                                   most=1000)
    skips: str = option("block", "one per block, or per level (SiD2)", choices=("block", "level"))
    patch: str = option("dwt", "first layer: dwt, conv or none", choices=("dwt", "conv", "none"))
    largest_map: int = option(128, "side of the largest feature map, by the first layer", least=16,
                              most=4096)
    dropout: float | None = option(None, "default: the model's", least=0, below=1)
    dropout_res: int = option(16, "dropout in convolutions on maps of at most this side", least=0)
    init: str = flag("", "model.pt to start from, also of another --res")
    # Schedule and loss
    schedule: str = flag("shifted", "noise schedule", choices=SCHEDULES)
    noise_d: int = option(32, "the size that the schedule is shifted to", least=1, most=4096)
    loss: str = flag("eps", "eps or v of the paper, sid2 of its successor",
                       choices=("eps", "v", "sid2"))
    bias: float | None = option(None, "b of sid2; default: by --res", least=-20, most=20)
    multiscale: bool | None = option(None, "multiscale loss, on or off; default: on from 512, "
                                   "off for sid2")
    coarsest: int = option(32, "multiscale loss: least side of a scale", least=8)
    drop_label: float = option(.1, "share of pictures without class or caption", least=0, below=1)
    # Optimiser
    batch: int | None = flag(None, "pictures a step, over all ranks (default: the model's)",
                               least=1, most=10**6)
    accum: int | None = flag(None, "parts that a rank computes its share of a batch in, with the "
                               "same gradient (default: as few as fit the memory)", least=1,
                               most=10**6, may_change=True)
    steps: int | None = flag(None, "optimiser steps of the whole run (default: the model's)",
                               least=1, most=99_999_999, may_change=True)
    optimizer: str | None = option(None, "adam, or muon for matrices; default: the model's",
                                   choices=("adam", "muon"))
    lr: float | None = flag(None, "learning rate after the warm-up (default: the model's)",
                              least=1e-30)
    warmup: int | None = option(None, "steps of linear warm-up; default: the model's", least=1)
    decay: float | None = option(None, "share of the steps, the last ones, in which the rate falls "
                                 "to 0; default: the model's", least=0, most=1)
    clip: float = option(1.0, "largest norm of the gradient", least=1e-9)
    ema: float = option(.9999, "decay of the moving average of weights", least=0, below=1)
    seed: int = flag(0, "of weights, pictures, noise and dropout", least=0, most=2**63 - 2)
    # Machine
    recompute: bool = flag(False, "less memory, slower: compute blocks again for the gradient",
                             may_change=True)
    shard: bool = flag(False, "each rank keeps a share of weights, EMA and optimiser (FSDP2)",
                         may_change=True)
    compile: bool | None = flag(None, "torch.compile (default: with CUDA)", may_change=True)
    bf16: bool | None = option(None, "on or off; default: on where the hardware has it",
                               may_change=True)
    workers: int | None = option(None, "processes that load pictures; default: up to 8 with CUDA",
                                 least=0, most=1024, may_change=True)
    timeout: float = option(30.0, "minutes to wait for a silent rank", least=.05, most=10_000,
                            may_change=True)
    # Folder and reports
    out: str = flag("", "folder of the run (default: runs/DATA-RES-MODEL)", may_change=True)
    log_every: int = flag(20, "steps between lines of log.jsonl", least=1, may_change=True)
    sample_every: int | None = flag(None, "steps between grids of samples; 0: none (default: with "
                                    "each checkpoint)", least=0, may_change=True)
    save_every: int | None = flag(None, "steps between checkpoints (default: 250 up to mini, "
                                  "else by time)", least=1, may_change=True)
    save_minutes: float = flag(15.0, "minutes between checkpoints at most", least=.01, most=1e6,
                               may_change=True)
    tensorboard: bool = flag(False, "also log for TensorBoard (pip install tensorboard)",
                             may_change=True)

    def network_settings(self, classes):
        """The settings of the network, for checkpoint.build_network; classes: how many."""
        shape = PRESETS[self.model]["network"]
        common = dict(architecture=self.architecture, res=self.res, patch=self.patch,
                      dropout_res=self.dropout_res, classes=classes, portrait=self.portrait)
        dropout = shape["dropout"] if self.dropout is None else self.dropout
        if self.architecture == "unet":
            return common | dict(
                channels=shape["widths"][0], head_dim=shape["head_dim"], emb_dim=shape["emb_dim"],
                dropout=min(.1, dropout) if self.dropout is None else dropout,
                blocks_16=self.blocks_16 or 12)
        return common | shape | dict(
            dropout=dropout, depth=self.blocks_16 or shape["depth"], largest_map=self.largest_map,
            skips=self.skips, text=self.text, text_length=self.text_length,
            text_width=shape["emb_dim"] // 2)


QUICK = "laptop", "tiny", "mini"            # models that are saved every 250 steps

EXAMPLES = """Train a network by simple diffusion.

  python train.py                                       flowers at 64 x 64, on any machine
  python train.py --data PATH --res 128 --model mini    your pictures, one GPU
  torchrun --nproc_per_node=8 train.py --data PATH --res 512
  python train.py --res 128 --model mini --loss v       the loss of the paper's list of settings

The same command resumes a run that was stopped or killed.
"""


def parse_config(argv=None):
    """argv -> Config with all that --res and --model choose. Wrong input: a line, exit code 2."""
    config = parse(Config, argv, EXAMPLES)
    config.res = checked_size(config)
    config.model = config.model or default_model(config.res, has_cuda())
    folder = Path(config.out).parent
    if config.out and folder != Path("runs") and not os.path.isdir(folder):     # runs/ is made
        fail(f"--out {config.out}: the folder it is to be in does not exist; make that first")
    for given, what in ((config.text, "--text"), (config.skips == "level", "skips=level"),
                        (config.largest_map != 128, "largest_map")):
        if given and config.architecture == "unet":
            fail(f"--set architecture=unet: has no {what}; architecture=uvit has")
    if config.tensorboard and not find_spec("tensorboard"):
        fail("--tensorboard: needs pip install tensorboard")
    if config.text and config.text != "bytes" and not config.text.startswith("t5:"):
        fail(f"--text {config.text}: must be bytes, or t5:NAME")
    if config.architecture == "unet":
        config.optimizer = config.optimizer or "adam"
    papers_unet = config.architecture == "unet" and config.model == "paper"
    training = PAPER_TRAINING if papers_unet else PRESETS[config.model]["training"]
    for name, value in training.items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    if config.model in QUICK:
        config.save_every = config.save_every or 250
    config.optimizer, config.decay = config.optimizer or "adam", config.decay or 0.0
    if config.multiscale is None:
        config.multiscale = mean_side(config.res) >= 512 and config.loss != "sid2"
    for useless, name, needs in (
            (config.bias is not None and config.loss != "sid2", "bias", "--loss sid2"),
            (config.coarsest != 32 and not config.multiscale, "coarsest", "--set multiscale=on"),
            (config.noise_d != 32 and config.schedule == "cosine", "noise_d", "--schedule shifted"),
            (config.text_length != 128 and not config.text, "text_length", "--text"),
            (config.largest_map != 128 and config.patch == "none", "largest_map", "patch=dwt")):
        if useless:
            fail(f"--set {name}={getattr(config, name)}: is for {needs}")
    name = Path(os.path.abspath(config.data)).stem if config.data else "flowers"
    config.out = config.out or f"runs/{name}-{config.res}-{config.model}"
    return config


def checked_size(config):
    """--res as a number, or as "HxW" if that is not square. Exits with the nearest that fits."""
    if not re.fullmatch(r"0*[1-9]\d{0,3}(x0*[1-9]\d{0,3})?", config.res):
        fail(f"--res {config.res}: must be pixels, like 64 or 384x640 (height x width)")
    height, width = height_width(config.res)
    # The nearest size that fits. It may have other halvings than the one asked for: try again.
    near, fits, steps = None, [height, width], []
    model = config.model or default_model(config.res, has_cuda())
    smallest = 8 if config.architecture == "unet" else \
        128 >> len(PRESETS[model]["network"]["blocks"])
    while near != fits:
        near, size = fits, "{}x{}".format(*fits)
        halvings = halvings_to(smallest, size, config.largest_map)
        steps.append(2 ** (patch_levels(size, config.largest_map) + halvings))
        fits = [min(4096 // steps[-1], max(-(-16 // steps[-1]), round(side / steps[-1])))
                * steps[-1] for side in near]
    if [height, width] != near:
        near = f"{near[0]}x{near[1]}" if near[0] != near[1] else near[0]
        also = f" and, at this size, multiples of {steps[0]}" if steps[0] > 1 else ""
        tiny = ""
        if also and config.architecture == "uvit" and smallest == 8:        # `laptop`
            tiny = f"; --model tiny takes multiples of {steps[0] // 2}"
        fail(f"--res {config.res}: sides must be from 16 to 4096{also}, for example {near}{tiny}")
    if config.portrait and height >= width:
        fail(f"--portrait --res {config.res}: needs a size wider than high, like 384x640")
    return height if height == width else f"{height}x{width}"


# ---------------------------------------------------------------------------- sample.py

@dataclass
class SamplingOptions:
    ckpt: str = flag("", "model.pt of a run (default: the newest in runs/, else assets/photos.pt"
                       ", or with prompts assets/words.pt)")
    out: str = flag("", "folder for the pictures (default: samples)")
    n: int | None = flag(None, "pictures (default: 20, or one per prompt)", least=1, most=10**7)
    sampler: str = flag("sde", "sde or dpm (DPM-Solver++ with noise or without), ancestral (the "
                        "paper's), ddim", choices=("sde", "dpm", "ancestral", "ddim"))
    steps: int | None = flag(None, "network calls per picture (default: 18; 128 for ancestral and "
                             "ddim)", least=1, most=100_000)
    gamma: float | None = flag(None, "variance of ancestral steps, 0 to 1 (default: 0.2)", least=0,
                               most=1)
    guidance: float | None = flag(None, "1 + eta of the paper; 1 is off (default: 3 with a "
                                  "choice of classes or a prompt, else 1)", least=0)
    guidance_interval: tuple[float, float] | None = flag(
        None, "logsnr between which there is guidance (default: everywhere)",
        metavar=("LOW", "HIGH"))
    schedule: str | None = flag(None, "of ancestral and ddim: cosine, shifted or interpolated "
                                "(default: as trained)", choices=SCHEDULES)
    label: str = flag("", "class, by name or by number from 0 (default: all in turn)")
    prompt: list[str] = flag([], "captions, drawn in turn")
    prompts: str = flag("", "file with a caption per line")
    portrait: bool = flag(False, "upright pictures, from a model trained with --portrait")
    film: bool = flag(False, "also z_t and x_hat of the first picture, step by step: film.png, "
                      "film.webp (moving)")
    between: tuple[int, int] | None = flag(
        None, "walk from picture A to picture B of the same command; film.webp shows it",
        metavar=("A", "B"))
    seed: int = flag(0, "same seed, same pictures", least=0, most=2**63)
    batch: int | None = flag(None, "pictures at a time (default: 16; 4 on a CPU)", least=1,
                             most=10_000)
    compile: bool = flag(False, "compile the network, for many pictures on a GPU")
    bf16: bool | None = flag(None, "on or off (default: on where the hardware has it)")


SAMPLING_EXAMPLES = """Draw pictures with a trained model.

  python sample.py                                     20 pictures of the newest run
  python sample.py --label 2 --guidance 4              one class, drawn more strongly
  python sample.py --prompt "a red flower"             a caption, by bundled weights
  python sample.py --sampler ancestral                 the paper's sampler, 128 steps
"""


def parse_sampling(argv):
    """argv -> SamplingOptions. Wrong input: one line, exit code 2."""
    options = parse(SamplingOptions, argv, SAMPLING_EXAMPLES)
    if options.prompts:
        try:
            lines = Path(options.prompts).read_text("utf-8-sig", "replace").splitlines()
        except OSError as error:
            fail(f"--prompts {options.prompts}: {error.strerror}")
        options.prompt = options.prompt + [line for line in lines if line.strip()]
        if not options.prompt:
            fail(f"--prompts {options.prompts}: holds no line")
    if options.gamma is not None and options.sampler != "ancestral":
        fail(f"--gamma {options.gamma}: is for --sampler ancestral")
    options.gamma = .2 if options.gamma is None else options.gamma
    options.spacing = "asinh" if options.sampler in ("sde", "dpm") else "t"     # of the steps
    if options.schedule and options.spacing != "t":
        fail(f"--schedule {options.schedule}: is for --sampler ancestral or ddim")
    options.steps = options.steps or (18 if options.spacing == "asinh" else 128)
    options.n = options.n or len(options.prompt) * (not options.between) or 20
    if options.guidance_interval:
        low, high = options.guidance_interval
        if low > high:
            fail(f"--guidance-interval {low} {high}: the first must be the lower")
    if options.between:
        a, b = options.between
        if min(a, b) < 0 or a == b or options.n < 2:
            fail(f"--between {a} {b}: needs two different numbers from 0 on, and --n of 2 or more")
        if options.film or options.guidance_interval:
            fail("--between: not together with --film or --guidance-interval")
    return options
