"""Sampling (Appendix A): ancestral sampler, DDIM, guidance; `python sample.py` writes pictures.

From z at t = 1, unit noise, a uniform grid of t runs down to 0 in `steps` steps t -> s, s < t. Each
asks the network once for x_hat. The last step returns x_hat itself: N steps are N calls.
"""
import argparse
import glob
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from loss import x_from_v
from schedule import alpha_sigma, logsnr_schedule
from uvit import UViT


def ancestral_step(z, x_hat, logsnr_t, logsnr_s, gamma, noise):
    """Ancestral step t -> s (Appendix A): z_t, x_hat, noise: (B, C, H, W); logsnr: (B,) -> z_s.

    mu = alpha_s (z_t (1 - c) / alpha_t + c x_hat), c = 1 - SNR_t / SNR_s; the log variance lies
    between its two bounds, c sigma_t^2 (gamma = 1) and c sigma_s^2 (gamma = 0).
    """
    alpha_t, sigma_t = alpha_sigma(logsnr_t)
    alpha_s, sigma_s = alpha_sigma(logsnr_s)
    c = -torch.expm1(logsnr_t - logsnr_s)[:, None, None, None]
    mu = alpha_s * (z * (1 - c) / alpha_t + c * x_hat)
    log_variance = gamma * torch.log(c * sigma_t**2) + (1 - gamma) * torch.log(c * sigma_s**2)
    return mu + torch.exp(log_variance / 2) * noise


def ddim_step(z, x_hat, logsnr_t, logsnr_s):
    """DDIM step t -> s (not in the paper; for few steps): same x_hat and eps_hat, less noise."""
    alpha_t, sigma_t = alpha_sigma(logsnr_t)
    alpha_s, sigma_s = alpha_sigma(logsnr_s)
    return alpha_s * x_hat + sigma_s * (z - alpha_t * x_hat) / sigma_t


def guided(model, z, logsnr, label, guidance):
    """v_hat with guidance (Appendix A), in one call: (B, C, H, W), (B,), (B,) -> (B, C, H, W).

    eps_hat = (1 + eta) eps_cond - eta eps_uncond, guidance = 1 + eta; at the same z, eps is affine
    in v, so the same combination of v gives it. guidance = 1 is the conditional model.
    """
    if guidance == 1:
        return model(z, logsnr, label).float()
    assert label is not None, f"guidance {guidance} needs labels; 1 is off"
    null = torch.full_like(label, model.classes)
    v_hat = model(torch.cat([z, z]), torch.cat([logsnr, logsnr]), torch.cat([label, null])).float()
    cond, uncond = v_hat.chunk(2)
    return guidance * cond + (1 - guidance) * uncond


@torch.no_grad()
def sample(model, logsnr, noise, steps, label=None, sampler="ancestral", gamma=0.2, guidance=1.0,
           bar=False):
    """Pictures (B, C, H, W) in [-1, 1] by exactly `steps` calls of model (Appendix A).

    model: (z, logsnr, label) -> v_hat;  logsnr: a schedule, t -> (B,);  noise: () -> fresh unit
    noise (B, C, H, W);  label: (B,) or None;  sampler: "ancestral" or "ddim";  gamma: 0 to 1.
    """
    z = noise()
    t = torch.linspace(1, 0, steps + 1, device=z.device)
    for i in tqdm(range(steps), desc="sampling", disable=not bar, leave=False):
        logsnr_t, logsnr_s = logsnr(t[i].expand(len(z))), logsnr(t[i + 1].expand(len(z)))
        v_hat = guided(model, z, logsnr_t, label, guidance)
        x_hat = x_from_v(z, v_hat, *alpha_sigma(logsnr_t)).clamp(-1, 1)
        if i == steps - 1:
            return x_hat
        if sampler == "ddim":
            z = ddim_step(z, x_hat, logsnr_t, logsnr_s)
        else:
            z = ancestral_step(z, x_hat, logsnr_t, logsnr_s, gamma, noise())


# ---------------------------------------------------------------------------- files and ranks

# What a seed is for: the first number of its key, so that no two streams are ever the same.
TRAINING, SAMPLING, DROPOUT = 1, 2, 3


def seed_of(purpose, *key):
    """A mixed seed from whole numbers, e.g. (TRAINING, seed, picture); CPUs use 32 bits of it."""
    mixed = np.random.SeedSequence((purpose, *key)).generate_state(1, np.uint64)
    return int(mixed[0] >> np.uint64(1))


def picture_noise(seed, indices, res, device):
    """A `noise` for `sample`: picture i's depends on (seed, i) alone, whatever shares its batch."""
    generators = [torch.Generator(device).manual_seed(seed_of(SAMPLING, seed, i))
                  for i in indices]
    return lambda: torch.stack([torch.randn(3, res, res, generator=generator, device=device)
                                for generator in generators])


def to_uint8(x):
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8 numpy."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def grid(pictures, columns):
    """List of (H, W, 3) uint8 -> one PIL picture, row by row, white where the last row is short."""
    h, w, _ = pictures[0].shape
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * h, columns * w, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = i // columns * h, i % columns * w
        sheet[y:y + h, x:x + w] = picture
    return Image.fromarray(sheet)


def fail(message):
    """The user's input is wrong: one line, exit code 2, no traceback."""
    print(message, file=sys.stderr, flush=True)
    raise SystemExit(2)


def pick_device():
    """This rank's device, and whether its hardware has bf16. DEVICE=cpu in the environment: CPU."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available() and os.environ.get("DEVICE") != "cpu":
        if local_rank >= torch.cuda.device_count():
            fail(f"rank {local_rank} has no GPU of its own: --nproc_per_node is at most "
                 f"{torch.cuda.device_count()} here")
        torch.cuda.set_device(local_rank)
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.device("cuda", local_rank), has_bf16
    if torch.backends.mps.is_available() and not {"DEVICE", "RANK"} & os.environ.keys():
        return torch.device("mps"), False           # alone: gloo has no MPS
    return torch.device("cpu"), torch.cpu._is_avx512_bf16_supported()


def load_model(path, device):
    """model.pt -> UViT with EMA weights, and the dict they came in: config, classes, step, ema."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    model = UViT.from_config(saved["config"], len(saved["classes"]))
    model.load_state_dict(saved["ema"])
    return model.to(device).eval().requires_grad_(False), saved


def main(argv=None):
    parser = argparse.ArgumentParser(description="Draw pictures with a trained model.")
    parser.add_argument("--ckpt", default="", help="model.pt of a run (default: the newest)")
    parser.add_argument("--out", default="samples", help="folder for the pictures")
    parser.add_argument("--n", type=int, default=16, help="how many")
    parser.add_argument("--steps", type=int, default=128, help="network calls per picture")
    parser.add_argument("--sampler", choices=["ancestral", "ddim"], default="ancestral")
    parser.add_argument("--gamma", type=float, default=0.2, help="variance, 0 to 1")
    parser.add_argument("--guidance", type=float, default=1.0, help="1 + eta; 1 is off")
    parser.add_argument("--label", default="", help="a class, by name or number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16, help="pictures at a time")
    args = parser.parse_args(argv)

    ckpt = args.ckpt or max(glob.glob("runs/*/model.pt"), key=os.path.getmtime, default="")
    if not os.path.isfile(ckpt):
        fail(f"--ckpt {ckpt}: no such file" if ckpt else
             "no model.pt under runs/: train one first (python train.py) or name it (--ckpt)")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, bf16 = pick_device()
    try:
        model, saved = load_model(ckpt, device)
    except Exception as error:
        fail(f"--ckpt {ckpt}: not a model.pt of ours ({type(error).__name__})")
    config, classes = saved["config"], saved["classes"]

    if args.n < 1 or args.steps < 1 or args.batch < 1:
        fail(f"--n {args.n}, --steps {args.steps}, --batch {args.batch}: each must be at least 1")
    if args.seed < 0:
        fail(f"--seed {args.seed}: must be at least 0")
    if not 0 <= args.gamma <= 1:
        fail(f"--gamma {args.gamma}: must be from 0 to 1")
    if not classes and (args.guidance != 1 or args.label):
        fail(f"--guidance and --label need a model with classes; {ckpt} was trained without")
    if args.label in classes:
        wanted = [classes.index(args.label)]
    elif args.label:
        if not args.label.isdigit() or int(args.label) >= len(classes):
            fail(f"--label {args.label}: not one of 0 to {len(classes) - 1}: {', '.join(classes)}")
        wanted = [int(args.label)]
    else:
        wanted = range(len(classes))

    # Fixed batches, batch k by rank k mod world: the same pictures on any number of ranks.
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    logsnr = logsnr_schedule(config["schedule"], config["res"], config["noise_d"])
    for start in range(args.batch * rank, args.n, args.batch * world):
        indices = range(start, min(start + args.batch, args.n))
        label = None
        if classes:
            label = torch.tensor([wanted[i % len(wanted)] for i in indices], device=device)
        noise = picture_noise(args.seed, indices, config["res"], device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            x = sample(model, logsnr, noise, args.steps, label, args.sampler, args.gamma,
                       args.guidance, bar=rank == 0)
        for i, picture in zip(indices, to_uint8(x)):
            Image.fromarray(picture).save(out / f"{i:06d}.png")
    if world > 1:
        dist.init_process_group("gloo")
        dist.barrier()
        dist.destroy_process_group()
    if rank == 0:
        # samples.npz, for FID evaluators: arr_0 (N, H, W, 3) uint8, written picture by picture.
        picture = lambda i: np.asarray(Image.open(out / f"{i:06d}.png"))
        header = dict(descr="|u1", fortran_order=False, shape=(args.n, *picture(0).shape))
        with zipfile.ZipFile(out / "samples.npz", "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for i in range(args.n):
                    file.write(picture(i).tobytes())
        columns = len(wanted) if 1 < len(wanted) <= 12 else max(1, round(min(args.n, 100) ** .5))
        shown = range(min(args.n, 10 * columns))
        grid([picture(i) for i in shown], columns).save(out / "grid.png")
        print(f"{args.n} pictures from {ckpt} (step {saved['step']}) in {out}/: "
              "grid.png, 000000.png ..., samples.npz")


if __name__ == "__main__":
    main()
