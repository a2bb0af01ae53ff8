"""Speed beside other implementations: equal work, in one run, in turns.

    pip install einops PyWavelets ptwt "setuptools<81"
    pip install --no-deps denoising-diffusion-pytorch pytorch_wavelets diffusers
    pip install huggingface_hub safetensors regex requests filelock importlib_metadata
    python benchmarks/speed.py                    all that this machine can do, as Markdown
    python benchmarks/speed.py train wavelet      train, dial, wavelet, sample, load, start, ranks,
                                                  memory; with CUDA also gpu

Times are medians of rounds in which all contenders take turns. MFU is the FLOP/s that
torch.utils.flop_counter counts, over those of a 4096-cube bfloat16 product (8192 on a GPU) in the
same rounds. Other implementations run eager and compiled. One that is not installed is left out,
with a note.
"""
import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
warnings.simplefilter("ignore")

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from cli import fail
from data import Pictures, from_uint8
from flowers import Flowers, draw_flower
from loss import diffusion_loss
from memory import checkpointable_blocks, recompute_blocks
from noise import draw_noise, picture_noise
from ranks import compile_options, pick_device
from sample import sample
from schedule import logsnr_schedule
from uvit import PRESETS, Condition, UViT
from wavelet import dwt, idwt

DEVICE = pick_device()[0]
CUDA = DEVICE.type == "cuda"
SHAPE = dict(widths=(192, 320, 512), blocks=(2, 2), depth=5, head_dim=64, emb_dim=256)      # 32.8 M


def say(text=""):
    print(text, flush=True)


def now():
    """Seconds, once the device has done all that was asked of it."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def in_turn(rounds, **contenders):
    """{name: function} -> {name: seconds of each round}, after two calls without a time."""
    times = {name: [] for name in contenders}
    for k in range(-2, rounds):
        for name, function in contenders.items():
            start = now()
            function()
            if k >= 0:
                times[name].append(now() - start)
    return times


def ratio(above, below):
    """Median over rounds of above / below, and its lowest and highest."""
    parts = sorted(a / b for a, b in zip(above, below))
    return f"{median(parts):.2f} ({parts[0]:.2f} to {parts[-1]:.2f})"


def product(n=8192 if CUDA else 4096):
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return (lambda: a @ b), 2 * n**3


# ---------------------------------------------------------------------------- the networks

def ours(res=64, shape=SHAPE):
    return UViT(res, **shape)


def ddp_uvit(**shape):
    """The U-ViT of denoising-diffusion-pytorch: its file alone, the package imports much more."""
    spec = importlib.util.find_spec("denoising_diffusion_pytorch")
    if spec is None:
        raise ImportError("needs pip install denoising-diffusion-pytorch")
    found = spec.submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("other", Path(found, "simple_diffusion.py"))
    other = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)
    shape = shape or dict(dim=144, dim_mults=(2, 3), vit_depth=5, attn_dim_head=64, attn_heads=4)
    return other.UViT(**shape, vit_dropout=0.0)


def diffusers_unet():
    from diffusers import UNet2DModel
    unet = UNet2DModel(sample_size=64, block_out_channels=(128, 192, 352), layers_per_block=2,
                       attention_head_dim=32,
                       down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
                       up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"))

    class Unet(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = unet

        def forward(self, z, logsnr):
            return self.unet(z, logsnr).sample
    return Unet()


NETS = {"ours": ours, "denoising-diffusion-pytorch": ddp_uvit,
        "diffusers UNet2DModel": diffusers_unet}


def build(name, how, make=None):
    """A network, eager or compiled: ours as train.py does it, others by their defaults."""
    torch.manual_seed(0)
    model = (make or NETS[name])().to(DEVICE)
    if how == "compiled":
        ours_too = name.startswith("ours")
        model.compile(**(dict(options=compile_options(DEVICE), dynamic=False) if ours_too else {}))
    return model


def training_step(model, res, batch, bf16=True):
    """A step of train.py without loading: noise, loss, gradient, Adam, EMA -> function."""
    ema = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, fused=True)
    schedule = logsnr_schedule("shifted", res)
    x = torch.randn(batch, 3, res, res, device=DEVICE).clamp(-1, 1)
    net = lambda z, logsnr, cond: model(z, logsnr)

    def step():
        t, eps, _ = draw_noise(0, range(batch), res, DEVICE)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
            loss = diffusion_loss(net, x, t, eps, schedule, multiscale=res >= 512)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(ema, list(model.parameters()), 0.001)
    return step


def flops(make, res, backward=True):
    """FLOPs of a call for one picture, with its gradient or without -> FLOPs, weights.

    On the meta device: the counter does not know the CPU's attention, and the compiler does not
    work under it.
    """
    with torch.device("meta"):
        model = make()
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
            v_hat = model(torch.empty(1, 3, res, res), torch.empty(1))
            if backward:
                v_hat.float().square().mean().backward()
    return counter.get_total_flops(), sum(p.numel() for p in model.parameters())


def installed(nets):
    for name in list(nets):
        try:
            with torch.device("meta"):
                NETS[name]()
            yield name
        except Exception as error:
            say(f"(left out: {name}: {type(error).__name__}: {str(error).splitlines()[0][:90]})")


def memory_of(name, how, batch):
    """Peak memory of a process that does three steps, MB: on a CPU the growth since its imports."""
    def most():                             # ru_maxrss would begin with that of the parent
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    import torch._inductor.compile_fx       # noqa: imports are not counted
    flops(NETS[name], 64)
    before = 0 if CUDA else most()
    step = training_step(build(name, how), 64, batch)
    for _ in range(3):
        step()
    if CUDA:
        return torch.cuda.max_memory_allocated() / 2**20
    return most() - before


def train(rounds=5, batch=8):
    say(f"\n### Training, 64 x 64, batch {batch}, bf16\n")
    matmul, cost = product()
    steps, sizes, work = dict(product=matmul), {}, {}
    for name in installed(NETS):
        cost_of_one, weights = flops(NETS[name], 64)
        sizes[name], work[name] = weights / 1e6, batch * cost_of_one
        for how in ("eager", "compiled"):
            steps[name, how] = training_step(build(name, how), 64, batch)
            steps[name, how]()
    for name in work:
        assert abs(sizes[name] / sizes["ours"] - 1) < .05, (name, sizes)
        assert abs(work[name] / work["ours"] - 1) < .05, (name, work)
    times = in_turn(rounds, **{str(i): step for i, step in enumerate(steps.values())})
    times = dict(zip(steps, times.values()))
    peak = times.pop("product")
    say("| network | weights, M | GFLOP / picture | | pictures/s | MFU | FLOP/s of ours over its | "
        "peak memory, MB |\n|-|-|-|-|-|-|-|-|")
    ours_at = min([("ours", how) for how in ("eager", "compiled")], key=lambda k: median(times[k]))
    for (name, how), seconds in times.items():
        child = [sys.executable, __file__, "child", name, how, str(batch)]
        memory = float(subprocess.run(child, capture_output=True, text=True, check=True).stdout)
        mfu = ratio([work[name] / s for s in seconds], [cost / s for s in peak])
        ahead = ratio([work["ours"] / s for s in times[ours_at]], [work[name] / s for s in seconds])
        say(f"| {name} | {sizes[name]:.1f} | {work[name] / batch / 1e9:.1f} | {how} | "
            f"{batch / median(seconds):.2f} | {mfu} | {ahead} | {memory:.0f} |")
    say(f"\nThe product: {cost / median(peak) / 1e9:.0f} GFLOP/s.")


# ---------------------------------------------------------------------------- resolution

class Pixels(torch.nn.Module):
    """A network without anything between the wavelet and its inverse."""

    def __init__(self, levels):
        super().__init__()
        self.levels, self.scale = levels, torch.nn.Parameter(torch.ones(3 * 4**levels, 1, 1))

    def forward(self, z, logsnr):
        return idwt(dwt(z, self.levels) * self.scale, self.levels)


def resolution(rounds=5, batch=4):
    sides = ("64", "128", "256", "512", "1024")
    say(f"\n### Cost of resolution: one training step, batch {batch}, bf16, eager, without "
        "loading\n")
    say("| | " + " | ".join(sides) + " |\n|-|-|-|-|-|-|")
    for preset in ("tiny", "small"):
        steps, pixels = {}, {}
        for side in sides:
            model = ours(int(side), PRESETS[preset]["network"]).to(DEVICE)
            steps[side] = training_step(model, int(side), batch)
            bands = Pixels(model.wavelet_levels).to(DEVICE)
            pixels["pixels " + side] = training_step(bands, int(side), batch)
        times = in_turn(rounds, **steps, **pixels)
        say(f"| `{preset}`, over its step at 128 | "
            + " | ".join(ratio(times[side], times["128"]) for side in sides) + " |")
        say("| of which noise, wavelet and loss | "
            + " | ".join(ratio(times["pixels " + side], times["128"]) for side in sides) + " |")


# ---------------------------------------------------------------------------- wavelet

def wavelet(rounds=11):
    say("\n### Wavelet: two levels and back, (8, 3, 512, 512), float32\n")
    x = torch.randn(8, 3, 512, 512, device=DEVICE)
    compiled = torch.compile(lambda x: idwt(dwt(x, 2), 2))
    contenders = {"ours, eager": lambda: idwt(dwt(x, 2), 2), "ours, compiled": lambda: compiled(x)}
    with contextlib.suppress(ImportError):
        import pywt
        array, how = x.cpu().numpy(), dict(wavelet="bior2.2", mode="reflect")
        contenders["PyWavelets"] = lambda: pywt.waverec2(
            pywt.wavedec2(array, level=2, **how), **how)
    with contextlib.suppress(ImportError):
        import ptwt
        contenders["ptwt"] = lambda: ptwt.waverec2(
            ptwt.wavedec2(x, "bior2.2", mode="reflect", level=2), "bior2.2")
    with contextlib.suppress(ImportError):
        from pytorch_wavelets import DWTForward, DWTInverse
        forward = DWTForward(J=2, wave="bior2.2", mode="symmetric").to(DEVICE)
        inverse = DWTInverse(wave="bior2.2", mode="symmetric").to(DEVICE)
        contenders["pytorch_wavelets"] = lambda: inverse(forward(x))
        fast_forward, fast_inverse = torch.compile(forward), torch.compile(inverse)
        contenders["pytorch_wavelets, compiled"] = lambda: fast_inverse(fast_forward(x))
    contenders["a copy"] = lambda: x.clone()
    with torch.no_grad():
        times = in_turn(rounds, **contenders)
    best = min(("ours, eager", "ours, compiled"), key=lambda name: median(times[name]))
    say("| | ms | over ours |\n|-|-|-|")
    for name, seconds in times.items():
        say(f"| {name} | {1e3 * median(seconds):.1f} | {ratio(seconds, times[best])} |")
    model = ours(512, PRESETS["small"]["network"]).to(DEVICE)
    y = dwt(x, 2).requires_grad_()

    def layers():
        dwt(x, 2)
        idwt(y, 2).backward(x)
    times = in_turn(5, step=training_step(model, 512, 8), layers=layers)
    share = [100 * a / b for a, b in zip(times["layers"], times["step"])]
    say(f"\nFirst and last layer, with the gradient of the last, take {median(share):.2f}% of a "
        "training step of `small` at 512, batch 8, eager.")


# ---------------------------------------------------------------------------- sampling

def overhead(model, rounds, steps):
    """Time of the sampler outside of the network, and with guidance over without."""
    inside = []
    schedule = logsnr_schedule("shifted", 64)
    cond = Condition(torch.zeros(2, dtype=torch.long, device=DEVICE))

    def timed(z, logsnr, cond):
        start = now()
        v_hat = model(z, logsnr)
        inside.append(now() - start)
        return v_hat

    def draw(steps, guidance=1.0):
        noise = picture_noise(0, range(2), 64, DEVICE)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            sample(timed, schedule, noise, steps, cond, guidance=guidance)

    draw(4)
    parts = []
    for _ in range(3):
        inside.clear()
        start = now()
        draw(steps)
        total = now() - start
        parts.append(100 * (total - sum(inside)) / total)
        assert len(inside) == steps
    say(f"A {steps}-step sample of 2 pictures spends {median(parts):.2f}% of its time outside the "
        f"network ({min(parts):.2f} to {max(parts):.2f}).")
    times = in_turn(rounds, one=lambda: draw(8), two=lambda: draw(8, 2.0))
    say(f"Guidance takes {ratio(times['two'], times['one'])} times as long as none.\n")


def sampling(rounds=5, batch=8, steps=64):
    say("\n### Sampling, 64 x 64, bf16\n")
    overhead(build("ours", "eager").eval(), rounds, steps)
    matmul, cost = product()
    z, logsnr = torch.randn(batch, 3, 64, 64, device=DEVICE), torch.zeros(batch, device=DEVICE)

    def call(model):
        def forward():
            with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16):
                model(z, logsnr)
        return forward

    calls = {(name, how): call(build(name, how).eval())
             for name in installed(NETS) for how in ("eager", "compiled")}
    work = {name: batch * flops(NETS[name], 64, backward=False)[0] for name, _ in calls}
    times = in_turn(rounds, product=matmul, **{str(i): f for i, f in enumerate(calls.values())})
    peak = times.pop("product")
    times = dict(zip(calls, times.values()))
    best = min(("eager", "compiled"), key=lambda how: median(times["ours", how]))
    say(f"One call of the network, batch {batch}:\n\n"
        "| network | | MFU | FLOP/s of ours over its |\n|-|-|-|-|")
    for (name, how), seconds in times.items():
        mfu = ratio([work[name] / s for s in seconds], [cost / s for s in peak])
        ahead = ratio([work["ours"] / s for s in times["ours", best]],
                      [work[name] / s for s in seconds])
        say(f"| {name} | {how} | {mfu} | {ahead} |")


# ---------------------------------------------------------------------------- loading

class AsTorchvision:
    """torchvision's ImageFolder with Resize, RandomCrop, RandomHorizontalFlip, ToTensor and
    Normalize, by PIL alone.
    """

    def __init__(self, folder, res):
        self.files, self.res = sorted(Path(folder).rglob("*.jpg")), res

    def __getitem__(self, i):
        with open(self.files[i], "rb") as file:
            image = Image.open(file).convert("RGB")
        scale = self.res / min(image.size)
        size = [max(self.res, int(side * scale)) for side in image.size]
        image = image.resize(size, Image.Resampling.BILINEAR).crop((0, 0, self.res, self.res))
        if torch.rand(1) < .5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image, copy=True)).permute(2, 0, 1).contiguous()
        return pixels.float().div(255).sub_(.5).div_(.5)


def other_loader(folder):
    """Its name, and: size -> a data set."""
    try:
        from torchvision import transforms
        from torchvision.datasets import ImageFolder
    except Exception:
        return "PIL, as torchvision's ImageFolder", lambda res: AsTorchvision(folder, res)
    return "torchvision", lambda res: ImageFolder(str(folder), transforms.Compose([
        transforms.Resize(res), transforms.RandomCrop(res), transforms.RandomHorizontalFlip(),
        transforms.ToTensor(), transforms.Normalize(.5, .5)]))


def loading(rounds=5, count=16):
    say("\n### Loading, one core\n")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    (folder / "a").mkdir()
    for i in range(count):                  # with grain, as photographs have it: 0.7 MB each
        rng = np.random.default_rng(i)
        picture, _ = draw_flower(rng, 3 + i % 10, 2000)
        picture = picture + rng.normal(0, .02, picture.shape)
        image = Image.fromarray((picture.clip(0, 1) * 255).astype(np.uint8))
        image.save(folder / "a" / f"{i}.jpg", quality=90)
    name, other = other_loader(folder)

    def read(make, convert=False):
        return lambda: [from_uint8(make[i][0]) if convert else make[i] for i in range(count)]

    contenders = {}
    for res in (256, 512):
        contenders[f"{name}, JPEG, {res}"] = read(other(res))
        contenders[f"ours, JPEG, {res}"] = \
            lambda res=res: read(Pictures(folder, res), True)()         # no cache
    for res in (64, 128, 256, 512):
        contenders[f"ours, flowers, {res}"] = read(Flowers(res), True)
    times = in_turn(rounds, **contenders)
    shutil.rmtree(folder)
    torch.set_num_threads(threads)
    say("JPEGs of 2,000 x 2,000 pixels, 0.7 MB each.\n\n"
        f"| | ms per picture | {name} at 256 over it |\n|-|-|-|")
    for each, seconds in times.items():
        say(f"| {each} | {1e3 * median(seconds) / count:.1f} | "
            f"{ratio(times[f'{name}, JPEG, 256'], seconds)} |")


# ---------------------------------------------------------------------------- whole commands

def command(*arguments, ranks=0, threads=None, **env):
    """train.py in a process (or torchrun's ranks) of its own -> seconds, lines of its log."""
    start = ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    with tempfile.TemporaryDirectory() as out:
        call = [sys.executable, *(["-m", *start] if ranks else []), HERE / "train.py",
                "--out", f"{out}/run", "--sample-every", "0", "--accum", "1", *arguments]
        env = os.environ | env | (dict(OMP_NUM_THREADS=str(threads)) if threads else {})
        began = time.perf_counter()
        subprocess.run(list(map(str, call)), check=True, capture_output=True, env=env)
        took = time.perf_counter() - began
        return took, [json.loads(line) for line in open(f"{out}/run/log.jsonl")]


def start():
    say("\n### From the command to the first step\n")
    say("One step, its checkpoint and the end are included.\n")
    say("| command | seconds |\n|-|-|")
    times = [command("--steps", 1, "--compile", "off")[0] for _ in range(5)]
    say(f"| `python train.py --steps 1 --sample-every 0 --compile off` | {spread(times)} |")
    with tempfile.TemporaryDirectory() as cache:
        env = dict(TORCHINDUCTOR_CACHE_DIR=cache)
        times = [command("--steps", 1, "--compile", "on", **env)[0] for _ in range(4)]
    first, *again = times
    say(f"| `python train.py --steps 1 --sample-every 0 --compile on`, no cache | {first:.1f} |")
    say(f"| the same again | {spread(again)} |")


def spread(times):
    return f"{median(times):.1f} ({min(times):.1f} to {max(times):.1f})"


def ranks(rounds=3):
    say("\n### Two ranks with a thread each, over one process with two threads, same global "
        "batch\n")
    say("| model | pictures/s of two ranks over one |\n|-|-|")
    for model, batch, steps in (("tiny", 32, 24), ("small", 8, 6)):
        ends = []
        for _ in range(rounds):
            speeds = []
            for how in (dict(threads=2), dict(ranks=2, threads=1)):
                _, log = command("--model", model, "--res", 64, "--batch", batch, "--steps", steps,
                                 "--log-every", steps // 3, **how, DEVICE="cpu")
                speeds.append(max(line["images_per_second"] for line in log[2:]))
            ends.append(speeds)
        say(f"| `{model}`, batch {batch} | {ratio([b for a, b in ends], [a for a, b in ends])} |")


def memory():
    """Weights, gradient, two moments and EMA in float32: 20 bytes a weight. What ranks send: a ring
    passes each float on (n - 1) / n times to add it up, and as often to hand it out.
    """
    say("\n### Memory and traffic of each GPU at 512, computed\n")
    say("Float32 weights, gradient, optimizer and EMA; no activations, no copies. Sent by each GPU "
        "in a step, with a batch in one part: the gradient added up and handed out (DDP); or the "
        "weights handed out twice and the gradient added up (`--shard`, again in each part).\n\n"
        "| | GPUs | memory, GB: DDP | `--shard` | sent, GB a step: DDP | `--shard` |\n"
        "|-|-|-|-|-|-|")
    for name in ("base", "paper"):
        with torch.device("meta"):
            model = UViT(512, **PRESETS[name]["network"], classes=1000)
        weights = sum(p.numel() for p in model.parameters())
        blocks = [sum(p.numel() for p in block.parameters())
                  for block in checkpointable_blocks(model)]
        largest, rest = max(blocks), weights - sum(blocks)
        for gpus in (1, 8, 64, 512):
            # A rank's share of everything; parts outside of blocks, and two blocks (the next one is
            # on its way) as a whole.
            shared = 20 * weights / gpus + 4 * (rest + 2 * largest) * (gpus > 1)
            around = 4 * weights * (gpus - 1) / gpus
            say(f"| `{name}`, {weights / 1e6:,.0f} M | {gpus} | {20 * weights / 1e9:.1f} | "
                f"{shared / 1e9:.1f} | {2 * around / 1e9:.1f} | {3 * around / 1e9:.1f} |")


def gpu(batch=16):
    """Needs CUDA: `base` and `paper` at 512, the sampler with and without CUDA graphs."""
    say("\n### One GPU, 512 x 512, bf16, compiled\n")
    matmul, cost = product()
    makes = {"ours, `base`": lambda: ours(512, PRESETS["base"]["network"])}
    if "denoising-diffusion-pytorch" in installed(NETS):
        makes["denoising-diffusion-pytorch"] = lambda: ddp_uvit(
            dim=88, dim_mults=(1, 2, 12), patch_size=4, vit_depth=22, attn_dim_head=64,
            attn_heads=14)
    for name, make in reversed(makes.items()):
        torch._dynamo.reset()
        (work, size), model = flops(make, 512), build(name, "compiled", make)
        work, size = batch * work, size / 1e6
        times = in_turn(10, step=training_step(model, 512, batch), product=matmul)
        mfu = ratio([work / s for s in times["step"]], [cost / s for s in times["product"]])
        say(f"{name}: {size:.0f} M weights, {work / batch / 1e9:.0f} GFLOP per picture, "
            f"{batch / median(times['step']):.1f} pictures/s, MFU {mfu}")
    graphs(model.eval())                    # the last one: ours
    del model
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    paper(matmul, cost)


def graphs(model, batch=8, steps=64):
    """The sampler, compiled, with and without CUDA graphs."""
    torch._dynamo.reset()                   # another batch: else compiled for any
    plain = lambda z, logsnr, cond: model(z, logsnr)
    faster = torch.compile(plain, mode="reduce-overhead")
    noise, schedule = picture_noise(0, range(batch), 512, DEVICE), logsnr_schedule("shifted", 512)
    for name, net in dict(compiled=plain, graphs=faster).items():
        with torch.autocast("cuda", torch.bfloat16):
            times = in_turn(5, sample=lambda: sample(net, schedule, noise, steps))
        say(f"`base`, {steps} steps, {name}: {batch / median(times['sample']):.2f} pictures/s")


def paper(matmul, cost, batch=32):
    make = lambda: UViT(512, **PRESETS["paper"]["network"])
    torch.cuda.reset_peak_memory_stats()
    model = make().to(DEVICE)
    recompute_blocks(model)
    model.compile(options=compile_options(DEVICE), dynamic=False)
    work = batch * flops(make, 512)[0]      # without what is computed twice
    times = in_turn(3, step=training_step(model, 512, batch), product=matmul)
    mfu = ratio([work / s for s in times["step"]], [cost / s for s in times["product"]])
    say(f"`paper --recompute`, batch {batch}: {batch / median(times['step']):.1f} pictures/s, MFU "
        f"(without what is computed twice) {mfu}, "
        f"{torch.cuda.max_memory_allocated() / 2**30:.0f} GiB")


SECTIONS = dict(train=train, dial=resolution, wavelet=wavelet, sample=sampling, load=loading,
                start=start, ranks=ranks, memory=memory, gpu=gpu)

if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        print(memory_of(sys.argv[2], sys.argv[3], int(sys.argv[4])))
        sys.exit()
    wanted = sys.argv[1:] or [name for name in SECTIONS if name != "gpu" or CUDA]
    for name in set(wanted) - set(SECTIONS):
        fail(f"{name}: must be one of {', '.join(SECTIONS)}")
    say(f"torch {torch.__version__}, "
        f"{torch.cuda.get_device_name() if CUDA else f'{torch.get_num_threads()} CPU threads'}")
    for name in wanted:
        SECTIONS[name]()
