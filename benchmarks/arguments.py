"""The paper's arguments, computed from our own modules.

    python benchmarks/arguments.py table1       why to scale at 16 x 16 (Section 3.3, Table 1)
    python benchmarks/arguments.py gradient --ckpt runs/NAME/model.pt
                                                why high resolutions are noisy to learn from (3.2)
    python benchmarks/arguments.py decided --ckpt assets/flowers.pt
                                                why to shift: Figure 3, with samples

table1 needs no weights: it counts on PyTorch's meta device. Bytes are those of training: 2 for each
activation that the backward pass keeps (bfloat16), 20 for each weight (float32 weight, gradient,
Adam's two moments, EMA). Attention counts in its plain form, which keeps its matrix.
"""
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]
from ablations import label_rows
from checkpoint import load_model, write
from cli import Parser, fail
from data import from_uint8, grid, to_uint8
from flowers import Flowers
from loss import eps_from_v
from noise import draw_noise, picture_noise
from sample import sampling_steps
from schedule import alpha_sigma, logsnr_schedule, mean_side
from uvit import PRESETS, AttentionBlock, Condition, MLPBlock, ResBlock

MIB, GIB = 2**20, 2**30
GROUPS = 8


class Transformer(nn.Module):
    """One block of the U-ViT's transformer on a map: (B, C, H, W) -> same."""

    def __init__(self, width, head_dim, emb):
        super().__init__()
        self.mlp, self.attention = MLPBlock(width, emb, 0.0), AttentionBlock(width, head_dim)

    def forward(self, x, emb):
        tokens = x.flatten(2).mT
        return self.attention(self.mlp(tokens, emb)).mT.reshape(x.shape)


def cost(block, x, *inputs):
    """Bytes of activations that the backward pass keeps, bytes of weights, FLOPs, for all of x."""
    kept = {}

    def keep(tensor):
        whole = tensor if tensor._base is None else tensor._base    # a view takes no memory
        if not isinstance(whole, nn.Parameter) and tensor.is_floating_point():
            kept[id(whole)] = whole
        return tensor

    with FlopCounterMode(display=False) as counter, saved_tensors_hooks(keep, lambda part: part):
        block(x, *inputs)
    features = sum(2 * tensor.numel() for tensor in kept.values())
    return features, 20 * sum(p.numel() for p in block.parameters()), counter.get_total_flops()


def table1():
    """Features and kernels by level for a batch of 1024: of a convolution, and of our blocks."""
    batch, network = 1024, PRESETS["paper"]["network"]
    print("One 3 x 3 convolution (output and kernel), batch 1024, as in the paper's Table 1:\n")
    print("| size | width | features, GiB | kernel, MiB | GFLOPs per picture |\n|-|-|-|-|-|")
    for size, width in ((256, 128), (128, 128), (64, 256), (32, 512), (16, 1024)):
        with torch.device("meta"):
            conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
            x = torch.empty(1, width, size, size)
        with FlopCounterMode(display=False) as counter:
            h = conv(x)
        print(f"| {size} | {width} | {batch * 2 * h.numel() / GIB:.2f} | "
              f"{20 * conv.weight.numel() / MIB:.1f} | {counter.get_total_flops() / 1e9:.2f} |")
    print("\nOne block of ours (`--model paper`), all that its backward pass keeps:\n")
    print("| size | block, width | features, GiB | weights, MiB | GFLOPs per picture "
          "| features / weights, bytes |\n|-|-|-|-|-|-|")
    for size, width in zip((128, 64, 32, 16), network["widths"]):
        with torch.device("meta"):
            x, emb = torch.empty(1, width, size, size), torch.empty(1, network["emb_dim"])
            block = ResBlock(width, network["emb_dim"], 0.0, False) if size > 16 else \
                Transformer(width, network["head_dim"], network["emb_dim"])
        features, weights, flops = cost(block, x.requires_grad_(), emb)
        kind = "ResBlock" if size > 16 else "transformer"
        print(f"| {size} | {kind}, {width} | {batch * features / GIB:.1f} | {weights / MIB:.1f} "
              f"| {flops / 1e9:.2f} | {batch * features / weights:,.1f} |")


def signal(grams, squares, pictures):
    """Squared mean of a picture's gradient over its variance, both estimated without bias.

    grams: (groups, groups), dot products of the summed gradients of groups of pictures;
    squares: (groups,), sums of the squared norms of their gradients;  pictures: how many in all.
    """
    mean = grams.sum() / pictures**2
    variance = (squares.sum() / pictures - mean) * pictures / (pictures - 1)
    return (mean - variance / pictures) / variance      # the mean's own noise taken out


def jackknife(grams, squares, pictures):
    """-> signal, and its standard error from leaving out one group at a time, all of one size."""
    groups = len(squares)
    without = []
    for left in range(groups):
        kept = [i for i in range(groups) if i != left]
        without.append(signal(grams[kept][:, kept], squares[kept], pictures - pictures // groups))
    error = torch.stack(without).std(correction=0) * (groups - 1)**.5
    return signal(grams, squares, pictures), error


def flowers_model(ckpt):
    """model.pt of flowers by class -> network, configuration. Exits with a line if it is not."""
    try:
        model, saved = load_model(ckpt, torch.device("cpu"))
        if saved["classes"] != Flowers(64).classes or saved["config"]["data"]:
            raise ValueError(f"{ckpt}: was not trained on the flowers by class")
    except ValueError as error:
        fail(f"--ckpt {error}")
    return model, saved["config"]


def gradient(ckpt, pictures):
    """How noisy the gradient is: of the eps loss, and of its error averaged by 2, 4, ...

    Prints for each scale the variance of a picture's gradient over the square of its mean, which is
    about the batch at which the mean exceeds the noise (in brackets one standard error of the
    inverse up and down), and the share of the error's power that is left. Of white noise it would
    be a quarter each time. Takes 32 bytes for each weight and scale: meant for `tiny`.
    """
    model, config = flowers_model(ckpt)
    res = config["res"]
    schedule, data = logsnr_schedule(config["schedule"], res, config["noise_d"]), Flowers(res, 7)
    weights = list(model.parameters())
    scales = [2**k for k in range(12) if k == 0 or mean_side(res) / 2**k >= 32]
    sums = torch.zeros(len(scales), GROUPS, sum(p.numel() for p in weights))
    squares, power = torch.zeros(len(scales), GROUPS).double(), torch.zeros(len(scales))
    for n in range(pictures):
        x, cond, _ = data[n]
        x = from_uint8(x)
        t, eps, _ = draw_noise(7, [n], res, "cpu")
        logsnr = schedule(t)
        alpha, sigma = alpha_sigma(logsnr)
        z = alpha * x[None] + sigma * eps
        error = eps - eps_from_v(z, model(z, logsnr, label_of(cond.label)), alpha, sigma)
        for k, by in enumerate(scales):
            loss = F.avg_pool2d(error, by).square().mean()
            parts = torch.autograd.grad(loss, weights, retain_graph=by != scales[-1],
                                        allow_unused=True)
            whole = torch.cat([torch.zeros_like(p).flatten() if part is None else part.flatten()
                               for p, part in zip(weights, parts)])
            sums[k, n % GROUPS] += whole
            squares[k, n % GROUPS] += whole.square().sum()
            power[k] += loss.detach()
    print(f"{ckpt}, {res}, {pictures} pictures\n")
    print("| averaged to | power of the error | variance of a picture's gradient / squared mean "
          "(range: one standard error) |\n|-|-|-|")
    for by, total, square, share in zip(scales, sums, squares, power / power[0]):
        found, error = jackknife((total @ total.T).double(), square, pictures)
        high, low = found + error, found - error
        batch = f"{1 / found:,.0f} ({1 / high:,.0f} to {1 / low:,.0f})" if low > 0 else \
            f"more than {1 / high:,.0f}" if high > 0 else "more than can be measured"
        print(f"| {mean_side(res) / by:.0f} | {share:.1%} | {batch} |")


def label_of(number):
    return Condition(torch.tensor([number]))


def decided(ckpt, file):
    """Figure 3, with samples: x_hat at three t, then the sample; cosine above, shifted below.

    One network draws both, since logsnr is its only time input, from the same noise and without
    fresh noise (DDIM): with exact steps and an exact network both rows would follow one path. The
    condition is a flower of seven petals, guidance 3.
    """
    model, config = flowers_model(ckpt)
    steps, times = 200, (.8, .5, .2)
    strips, cond = [], label_of(Flowers(64).classes.index("7 petals"))
    for name in ("cosine", "shifted"):
        schedule = logsnr_schedule(name, config["res"], config["noise_d"])
        noise = picture_noise(0, [0], config["res"], "cpu")
        found = [x_hat for _, x_hat in
                 sampling_steps(model, schedule, noise, steps, cond, "ddim", guidance=3.0)]
        tiles = [found[round((1 - t) * steps)] for t in times] + found[-1:]
        strips.append(grid(list(to_uint8(torch.cat(tiles))), len(tiles)))
    wide = strips[0].width // (len(times) + 1)
    above = {i * wide: f"t = {t:g}" for i, t in enumerate(times)} | {len(times) * wide: "t = 0"}
    sheet = label_rows(strips, ["cosine", "shifted"], above)
    try:
        write(file, lambda out: sheet.save(out, "WEBP", quality=88, method=6))
    except OSError as error:
        fail(f"{file}: {error.strerror or error}", 1)


def main(argv=None):
    parser = Parser(description="Compute an argument of the paper.")
    parser.add_argument("argument", choices=["table1", "gradient", "decided"])
    parser.add_argument("--ckpt", default="", help="model.pt of flowers by class, a large --res")
    parser.add_argument("--pictures", type=int, default=400)
    args = parser.parse_args(argv)
    if args.argument == "table1":
        return table1()
    if not args.ckpt:
        fail(f"{args.argument}: needs --ckpt, a model.pt of flowers by class")
    if args.argument == "decided":
        return decided(args.ckpt, ROOT / "assets" / "decided.webp")
    if args.pictures < 2 * GROUPS or args.pictures % GROUPS:
        fail(f"--pictures {args.pictures}: must be a multiple of {GROUPS}, {2 * GROUPS} or more")
    gradient(args.ckpt, args.pictures)


if __name__ == "__main__":
    main()
