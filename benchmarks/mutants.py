"""Breaks the formulas one at a time and shows that the tests notice.

    python benchmarks/mutants.py              schedule, wavelet, losses, samplers, network
    python benchmarks/mutants.py trainer      the trainer and the loader
    python benchmarks/mutants.py survival     what a run survives, and what is refused
    python benchmarks/mutants.py words        captions, shapes, the U-Net, SiD2

Each row is one wrong sign, factor, argument or index, and the first test that it turns red. A row that
ends in SURVIVED is a formula no test guards; the exit code counts them.
"""
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
TESTS = ("schedule_ or schedules_ or shift_ or averaging or interpolated or variance or wavelet or constant_picture or perfect or alpha_squared "
         "or rotation or network_sees or unknown_kind or pooled or multiscale_weights or test_sampler or last_step or guidance "
         "or picture_does_not or skip or mlp or attention or clock or bottom or average_pool or dropout_acts or label_and "
         "or every_patch or zero_at or preset or above_128")

PYTEST = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", "test_all.py"]
MUTANTS = [     # file, what stands there (once), what is put in its place
    ("schedule.py", "LOGSNR_MIN, LOGSNR_MAX = -15.0", "LOGSNR_MIN, LOGSNR_MAX = -14.0"),
    ("schedule.py", "LOGSNR_MAX = -15.0, 15.0", "LOGSNR_MAX = -15.0, 20.0"),
    ("schedule.py", "-LOGSNR_MAX / 2)), math", "LOGSNR_MAX / 2)), math"),
    ("schedule.py", "-LOGSNR_MIN / 2", "-LOGSNR_MIN"),
    ("schedule.py", "return -2 * torch.log(", "return 2 * torch.log("),
    ("schedule.py", "return -2 * torch.log(", "return -torch.log("),
    ("schedule.py", "t * (t_max - t_min)", "t * t_max"),
    ("schedule.py", "torch.tan(", "torch.sin("),
    ("schedule.py", "    assert t.dtype in", "    t = t.float()\n    assert t.dtype in"),
    ("schedule.py", "2 * math.log(noise_d / d)", "2 * math.log(d / noise_d)"),
    ("schedule.py", "2 * math.log(noise_d / d)", "math.log(noise_d / d)"),
    ("schedule.py", "logsnr_cosine(t) + 2", "logsnr_cosine(t) - 2"),
    ("schedule.py", "def logsnr_shifted(t, d, noise_d=32)", "def logsnr_shifted(t, d, noise_d=64)"),
    ("schedule.py", "noise_d_low=32, noise_d_high=256", "noise_d_low=256, noise_d_high=32"),
    ("schedule.py", "return t * logsnr_shifted(t, d, noise_d_low) + (1 - t)", "return (1 - t) * logsnr_shifted(t, d, noise_d_low) + t"),
    ("schedule.py", "lambda t: logsnr_shifted(t, d, noise_d)", "lambda t: logsnr_shifted(t, noise_d, d)"),
    ("schedule.py", "lambda t: logsnr_interpolated(t, d, noise_d)", "lambda t: logsnr_interpolated(t, d)"),
    ("schedule.py", "torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr)", "torch.sigmoid(-logsnr).sqrt(), torch.sigmoid(logsnr)"),
    ("schedule.py", "torch.sigmoid(-logsnr).sqrt()", "torch.sigmoid(-logsnr)"),
    ("wavelet.py", "odd_here - (here + following) / 2", "odd_here - (here + following) / 4"),
    ("wavelet.py", "odd_here - (here + following) / 2", "odd_here - here"),
    ("wavelet.py", "odd_last - last", "odd_last - last / 2"),
    ("wavelet.py", "following + (d_before + d_here) / 4", "following + (d_before + d_here) / 2"),
    ("wavelet.py", "following + (d_before + d_here) / 4", "following - (d_before + d_here) / 4"),
    ("wavelet.py", "first + d_first / 2, following", "first + d_first / 4, following"),
    ("wavelet.py", "even, odd = x.unflatten", "odd, even = x.unflatten"),
    ("wavelet.py", "s_here - (d_before + d_here) / 4", "s_here + (d_before + d_here) / 4"),
    ("wavelet.py", "s_first - d_first / 2", "s_first - d_first / 4"),
    ("wavelet.py", "d_before + (here + following) / 2", "d_before + (here + following) / 4"),
    ("wavelet.py", "d_last + last", "d_last + last / 2"),
    ("wavelet.py", "torch.stack([even, odd], dim)", "torch.stack([odd, even], dim)"),
    ("wavelet.py", "for d in (ds, sd, dd))], 1)", "for d in (sd, ds, dd))], 1)"),
    ("wavelet.py", "*(fold(d, 2**(levels - 1)) for d in", "*(dwt(d, levels - 1) for d in"),
    ("wavelet.py", "ss, *fine = y.split(c, 1)", "ss, *fine = y.flip(1).split(c, 1)"),
    ("wavelet.py", "permute(0, 1, 3, 5, 2, 4)", "permute(0, 1, 5, 3, 2, 4)"),
    ("wavelet.py", "permute(0, 1, 4, 2, 5, 3)", "permute(0, 1, 4, 3, 5, 2)"),
    ("wavelet.py", "unlift(ss, sd, -2)", "unlift(ss, sd, -1)"),
    ("wavelet.py", "c = y.shape[1] // 4", "c = y.shape[1] // 2"),
    ("loss.py", "return alpha * eps - sigma * x", "return alpha * eps + sigma * x"),
    ("loss.py", "return alpha * eps - sigma * x", "return sigma * eps - alpha * x"),
    ("loss.py", "return alpha * z - sigma * v", "return alpha * z + sigma * v"),
    ("loss.py", "return sigma * z + alpha * v", "return sigma * z - alpha * v"),
    ("loss.py", "return sigma * z + alpha * v", "return alpha * z + sigma * v"),
    ("loss.py", "error.square().mean() / s", "error.square().mean()"),
    ("loss.py", "error.square().mean() / s", "error.square().mean() * s"),
    ("loss.py", "error.square().mean() / s", "error.abs().mean() / s"),
    ("loss.py", "if s < 64:", "if s <= 64:"),
    ("loss.py", "if s < 64:", "if s < 32:"),
    ("loss.py", "F.avg_pool2d(error, 2)", "error[..., ::2, ::2]"),
    ("loss.py", "F.avg_pool2d(error, 2)", "2 * F.avg_pool2d(error, 2)"),
    ("loss.py", "** 0.5", "** 1.0"),
    ("loss.py", "z = alpha * x + sigma * eps", "z = alpha * eps + sigma * x"),
    ("loss.py", "model(z, logsnr_t, label)", "model(z, t, label)"),
    ("loss.py", "target, output = eps,", "target, output = x,"),
    ("loss.py", "multiscale_mse(output, target) if multiscale else", "F.mse_loss(output, target) if multiscale else"),
    ("sample.py", "c = -torch.expm1(logsnr_t - logsnr_s)", "c = torch.expm1(logsnr_t - logsnr_s)"),
    ("sample.py", "c = -torch.expm1(logsnr_t - logsnr_s)", "c = -torch.expm1(logsnr_s - logsnr_t)"),
    ("sample.py", "mu = alpha_s * (z * (1 - c) / alpha_t + c * x_hat)", "mu = alpha_t * (z * (1 - c) / alpha_t + c * x_hat)"),
    ("sample.py", "z * (1 - c) / alpha_t", "z * (1 - c) / alpha_s"),
    ("sample.py", "z * (1 - c) / alpha_t", "z * c / alpha_t"),
    ("sample.py", "gamma * torch.log(c * sigma_t**2) + (1 - gamma)", "(1 - gamma) * torch.log(c * sigma_t**2) + gamma"),
    ("sample.py", "torch.log(c * sigma_s**2)", "torch.log(c * sigma_s)"),
    ("sample.py", "torch.exp(log_variance / 2)", "torch.exp(log_variance)"),
    ("sample.py", "+ torch.exp(log_variance / 2) * noise", "+ 0 * noise"),
    ("sample.py", "(z - alpha_t * x_hat) / sigma_t", "(z - alpha_s * x_hat) / sigma_t"),
    ("sample.py", "(z - alpha_t * x_hat) / sigma_t", "(z - alpha_t * x_hat) / sigma_s"),
    ("sample.py", "alpha_s * x_hat + sigma_s *", "alpha_s * x_hat - sigma_s *"),
    ("sample.py", "guidance * cond + (1 - guidance) * uncond", "(1 + guidance) * cond - guidance * uncond"),
    ("sample.py", "guidance * cond + (1 - guidance) * uncond", "guidance * uncond + (1 - guidance) * cond"),
    ("sample.py", "unconditional(label, model.classes)", "unconditional(label, 0)"),
    ("sample.py", "torch.linspace(1, 0, steps + 1", "torch.linspace(1, 0, steps + 2"),
    ("sample.py", "torch.linspace(1, 0, steps + 1", "torch.linspace(0, 1, steps + 1"),
    ("sample.py", "logsnr_t, logsnr_s = clock[i:i + 2]", "logsnr_s, logsnr_t = clock[i:i + 2]"),
    ("sample.py", ".clamp(-1, 1)\n        if i", "\n        if i"),
    ("sample.py", "if i == steps - 1:", "if i == steps - 2:"),
    ("sample.py", 'if sampler == "ddim"', 'if sampler != "ddim"'),
    ("sample.py", "logsnr_s, gamma, noise())", "logsnr_s, gamma, z)"),
    ("sample.py", "seed_of(SAMPLING, seed, i))\n                  for i in indices", "seed_of(SAMPLING, seed, k))\n                  for k, i in enumerate(indices)"),
    ("uvit.py", "(h + self.norm_skip(skip)) / math.sqrt(2)", "h + self.norm_skip(skip)"),
    ("uvit.py", "(h + self.norm_skip(skip))", "(h + skip)"),
    ("uvit.py", "h = self.norm_film(h) * (1 + scale) + shift", "h = self.norm_film(h) * scale + shift"),
    ("uvit.py", "return x + self.conv_out(", "return self.conv_out("),
    ("uvit.py", "self.linear_out(self.dropout(h * (1 + scale) + shift))", "self.linear_out(self.dropout(h * scale + shift))"),
    ("uvit.py", "q, k = self.norm_q(q.float()).to(v.dtype), self.norm_k(k.float()).to(v.dtype)\n        h = F.scaled_dot_product_attention(q, k, v)", "h = F.scaled_dot_product_attention(q, self.norm_k(k.float()), v)"),
    ("uvit.py", "q, k = self.norm_q(q.float()).to(v.dtype), self.norm_k(k.float()).to(v.dtype)\n        h = F.scaled_dot_product_attention(q, k, v)", "h = F.scaled_dot_product_attention(self.norm_q(q.float()), k, v)"),
    ("uvit.py", "qkv.permute(2, 0, 3, 1, 4)", "qkv.permute(2, 0, 3, 1, 4).flip(0)"),
    ("uvit.py", "h = attention(mlp(h, emb))", "h = mlp(attention(h), emb)"),
    ("uvit.py", "skips.pop()", "skips.pop(0)"),
    ("uvit.py", "h = h + self.position", "h = h + 0"),
    ("uvit.py", "0.01 * torch.randn", "torch.randn"),
    ("uvit.py", "nn.AvgPool2d(2)", "nn.MaxPool2d(2)"),
    ("uvit.py", "torch.logspace(0, 2, self.emb", "torch.logspace(0, 3, self.emb"),
    ("uvit.py", "h = h + self.label(label[:, 0])", "h = h + 0"),
    ("uvit.py", "if size <= dropout_res", "if size < dropout_res"),
    ("uvit.py", "zero(nn.Conv2d(top, channels, 3, padding=1))", "(nn.Conv2d(top, channels, 3, padding=1))"),
    ("uvit.py", "math.ceil(math.log2(side(res) / 128))", "math.ceil(math.log2(side(res) / 256))"),
]

TRAINER_MUTANTS = [     # and the tests that may notice, since these take longer
    ("train.py", "diffusion_loss(net, x, t, eps, logsnr, label, config.loss, multiscale)", "diffusion_loss(model, x, t, eps, logsnr, label, config.loss, multiscale)", "ranks"),
    ("train.py", "yield range(first, first + micro)", "yield range(step * config.batch, step * config.batch + micro)", "accumulation"),
    ("train.py", "draw_noise(config.seed, first, micro, config.res, device)", "draw_noise(config.seed, step, micro, config.res, device)", "ranks or accumulation"),
    ("train.py", "(loss / config.accum).backward()", "loss.backward()", "accumulation"),
    ("train.py", "optimizer.load_state_dict(dict(state=state, param_groups=groups))", "pass", "killed"),
    ("train.py", "ema.load_state_dict(shared_as(ema.state_dict(), saved[\"ema\"]))", "pass", "killed"),
    ("train.py", "seed_of(DROPOUT, config.seed, step, rank)", "seed_of(DROPOUT, config.seed, step - start, rank)", "killed"),
    ("train.py", "for step in range(start, config.steps):\n            for part", "for step in range(config.steps):\n            for part", "killed"),
    ("train.py", "updates / (9 + updates)", "(1 + updates) / (10 + updates)", "ema_equals"),
    ("train.py", "1 - ema_decay(step, config.ema)", "ema_decay(step, config.ema)", "ema_equals"),
    ("train.py", "betas=(0.9, 0.99)", "betas=(0.9, 0.999)", "first_step"),
    ("train.py", "min(1, (step + 1) / config.warmup)", "min(1, (step + 2) / config.warmup)", "first_step"),
    ("train.py", "clip_grad_norm_(model.parameters(), config.clip)", "clip_grad_norm_(model.parameters(), 1e9)", "first_step"),
    ("train.py", "(~norm.isfinite()).float()", "(~norm.isfinite()).float() * 0", "finite"),
    ("train.py", "NOT_FINITE_AT_MOST = 10 ", "NOT_FINITE_AT_MOST = 11 ", "finite"),
    ("train.py", "(u < config.drop_label)[:, None]", "(u > config.drop_label)[:, None]", "dropped"),
    ("train.py", "        with torch.no_grad():\n            torch._foreach", "        if True:\n            torch._foreach", "graph_behind"),
    ("data.py", "divmod(n, len(self.names))", "divmod(n + 1, len(self.names) + 1)", "epoch"),
    ("data.py", "default_rng((2, self.seed, n))", "default_rng((2, self.seed, 0))", "flip or crop"),
    ("data.py", "else crop[:, ::-1]", "else crop[::-1]", "flip"),
    ("data.py", "self.order[1][(place + k) % len(self.names)]", "self.order[1][(place + k) % 2]", "epoch"),
    ("sample.py", "TRAINING, SAMPLING, DROPOUT = 1, 2, 3", "TRAINING, SAMPLING, DROPOUT = 1, 1, 1", "streams"),
]

SURVIVAL_MUTANTS = [
    ("checkpoint.py", "with open(part, \"wb\") as file:", "with open(path, \"wb\") as file:", "write_replaces"),
    ("checkpoint.py", "            part.unlink(missing_ok=True)\n", "            pass\n", "write_replaces"),
    ("checkpoint.py", "            cause = cause.__context__", "            cause = None", "full_disk"),
    ("checkpoint.py", "damaged = archive.testzip()", "damaged = None", "bad_checkpoint"),
    ("checkpoint.py", "if compressed or damaged:", "if damaged:", "bad_checkpoint"),
    ("checkpoint.py", "weights_only=True", "weights_only=False", "bad_checkpoint"),
    ("checkpoint.py", "if saved[\"format\"] > FORMAT:", "if saved[\"format\"] > 99:", "bad_checkpoint"),
    ("checkpoint.py", "        file.truncate(end)\n        raise", "        raise", "whole_lines"),
    ("checkpoint.py", "if json.loads(line)[\"step\"] > step or not line.endswith(b\"\\n\"):", "if not line.endswith(b\"\\n\"):", "whole_lines"),
    ("checkpoint.py", "> step or not line.endswith(b\"\\n\"):", "> step:", "whole_lines"),
    ("checkpoint.py", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB", "one_command"),
    ("train.py", "os.getppid() != PARENT", "False", "torchrun_is_killed"),
    ("train.py", "dist.all_reduce(ends, dist.ReduceOp.MAX, meet)", "pass", "torchrun_is_killed"),
    ("train.py", "asked.append(signum)", "None", "sigterm_does_not"),
    ("train.py", "            if stop:\n                raise InterruptedError\n", "", "sigterm_does_not"),
    ("train.py", ", worker_init_fn=ignore_signals", "", "sigterm_and_ctrl_c"),
    ("train.py", "at_exit.callback(signal.signal, told, before)", "pass", "sigterm_does_not"),
    ("train.py", "too_many()]).int()", "False]).int()", "more_than_half"),
    ("train.py", "            found |= skips\n", "", "more_than_half"),
    ("train.py", "if printable(name) not in named:", "if True:", "named_once"),
    ("train.py", "                named.add(printable(name))\n", "", "named_once"),
    ("train.py", "    late = report_due(start) and", "    late = False and", "sigterm_does_not"),
    ("train.py", "            skipped += int(saved[\"skipped\"])\n", "", "never_reaches"),
    ("train.py", "            if not sound:", "            if False:", "never_saved"),
    ("train.py", "torch.stack([loss.nan_to_num(0, 0, 0), loss.isfinite().float()])", "torch.stack([loss, loss.new_ones(())])", "never_reaches"),
    ("train.py", "if math.isfinite(value) else None", "if True else None", "never_reaches"),
    ("train.py", "f\"life {env['TORCHELASTIC_RESTART_COUNT']}\"", "\"life\"", "max_restarts"),
    ("train.py", "(silent if \"Timed out\" in str(error) else gone).append(rank)", "pass", "max_restarts"),
    ("train.py", "        except OSError as error:\n            tqdm.write", "        except ZeroDivisionError as error:\n            tqdm.write", "full_disk"),
    ("train.py", "    if not kept:\n", "    if False:\n", "full_disk"),
    ("train.py", "for part in out.glob(pattern + \".part\"):", "for part in []:", "leaves_no"),
    ("train.py", "at_exit.callback(log.close)", "pass", "leaves_no"),
    ("train.py", "not os.path.isdir(Path(config.out).absolute().parent)", "False", "wrong_input"),
    ("data.py", "tile.get(322, 0) * tile.get(323, 0)) > MAX_PIXELS:", "0) > 1 << 40:", "unfit"),
    ("data.py", "Image.open(io.BytesIO(raw), formats=FORMATS)", "Image.open(io.BytesIO(raw))", "unfit"),
    ("data.py", "{printable(str(error))}\"[:200]", "{error}\"[:200]", "unfit"),
    ("data.py", "            self.broken.pop(self.names[i], None)\n", "", "unreadable"),
    ("data.py", "onerror=unread, ", "", "unreadable"),
    ("data.py", "if part not in (\"\", \".\", \"..\")]", "if part not in (\"\", \".\")]", "lead_out"),
    ("data.py", "and name[-1] != \"/\" ", "", "lead_out"),
    ("data.py", "top = 1 if most <= 1.5 else", "top = 1 if most <= 1 else", "every_kind"),
    ("data.py", "np.nan_to_num(deep, nan=0)", "np.nan_to_num(deep, nan=9e9)", "every_kind"),
    ("data.py", ".clip(0, 65535)\n", ".clip(0, 255)\n", "every_kind"),
    ("train.py", "            block.forward = partial(checkpoint, block.forward, use_reentrant=False)", "            pass", "recompute"),
    ("train.py", "activation_memory_budget = config.memory_budget", "activation_memory_budget = 1", "keeps_a_share"),
    ("uvit.py", "expand(B, C, H, 2, W, 2).reshape", "expand(B, C, H, 2, W, 2).mT.reshape", "makes_each_value_a_square"),
    ("train.py", "            fully_shard(part, mesh=mesh, reshard_after_forward=True)", "            pass", "its_share_alone"),
    ("train.py", "[*residual_blocks(model), model, *residual_blocks(ema), ema]", "[*residual_blocks(model), model]", "its_share_alone"),
    ("train.py", "ema=whole_of(ema.state_dict(), master))", "ema=ema.state_dict())", "sharded_ranks"),
    ("train.py", "optimizer=whole_of(optimizer.state_dict(), master))", "optimizer=optimizer.state_dict())", "sharded_ranks"),
    ("train.py", "                state[i] |= shared_as(moments, {name: state[i][name] for name in moments})\n", "", "sharded_ranks"),
    ("train.py", "wait = ddp and not config.shard and", "wait = ddp and", "sharded_ranks"),
    ("train.py", "            if ddp:                         # told to one", "            if False:                       # told to one", "sigterm_to_one_of_two"),
    ("train.py", "                dist.all_reduce(sound, dist.ReduceOp.MIN, meet)\n", "                pass\n", "one_share"),
    ("data.py", "side = max(height, width) * 3 // 2", "side = max(height, width) // 2", "no_larger_than_needed"),
    ("data.py", "side = max(height, width) * 3 // 2", "side = max(height, width) * 2", "no_larger_than_needed"),
    ("sample.py", "        model.compile(mode=\"reduce-overhead\")\n", "        pass\n", "compiled_samples"),
    ("sample.py", "if not all(drawn(i) for i in indices):", "if True:", "half_way"),
    ("sample.py", "if not all(drawn(i) for i in indices):", "if not any(drawn(i) for i in indices):", "half_way"),
    ("sample.py", "                    old.unlink(missing_ok=True)\n", "                    pass\n", "starts_over"),
    ("sample.py", "if strangers or text and differ and args.out:", "if strangers:", "half_way"),
    ("sample.py", "strangers = not text and list(", "strangers = False and list(", "wrong_call"),
]

WORDS_MUTANTS = [
    ("text.py", "[byte + 1 for byte in", "[byte for byte in", "utf8"),
    ("text.py", "seen = tokens > 0\n        seen[:, 0] = True", "seen = tokens > -1", "masked or empty_caption"),
    ("text.py", "        seen[:, 0] = True\n", "", "masked or empty_caption"),
    ("text.py", "src_key_padding_mask=~seen", "src_key_padding_mask=None", "masked"),
    ("text.py", "self.token(tokens) + self.position.weight", "self.token(tokens)", "masked"),
    ("text.py", "rows[:, 1:2],", "torch.zeros_like(rows[:, 1:2]),", "unconditional or way_up"),
    ("text.py", "torch.full_like(rows[:, :1], classes)", "torch.zeros_like(rows[:, :1])", "unconditional or guidance"),
    ("text.py", "torch.zeros_like(rows[:, 2:])], 1)", "rows[:, 2:]], 1)", "unconditional or empty_caption"),
    ("text.py", "attention_mask=seen)", "attention_mask=None)", "t5"),
    ("text.py", "(1, 0), value=True)", "(1, 0), value=False)", "t5"),
    ("text.py", "last_hidden_state, (0, 0, 1, 0))", "last_hidden_state, (0, 0, 0, 1))", "t5"),
    ("text.py", "tokenizer(caption, truncation=True, max_length=length).input_ids if caption else []", "tokenizer(caption, truncation=True, max_length=length).input_ids", "t5"),
    ("uvit.py", "attn_mask=seen[:, None, None]", "attn_mask=None", "cross_attention or masked"),
    ("uvit.py", "self.kv(self.norm_text(text))", "self.kv(text)", "cross_attention"),
    ("uvit.py", "h = block(h, *caption)", "pass", "masked"),
    ("uvit.py", "(text * seen[..., None]).sum(1)", "text.sum(1)", "on_the_whole"),
    ("uvit.py", "/ seen.sum(1, keepdim=True))", "/ seen.shape[1])", "on_the_whole"),
    ("uvit.py", "h = h + self.portrait(label[:, 1])", "pass", "draws"),
    ("uvit.py", "h = unpool(h - after) + before if", "h = unpool(h) + before if", "residual_skip"),
    ("uvit.py", "h = unpool(h - after) + before if", "h = unpool(h - after) if", "residual_skip"),
    ("uvit.py", "grid = w, height // step, width // step", "grid = w, width // step, width // step", "384 or keep_what"),
    ("uvit.py", "waves(*grid) / 2", "waves(*grid)", "as_waves"),
    ("uvit.py", "-math.log2(max(H, W))", "-math.log2(H)", "as_waves"),
    ("uvit.py", "y[:, :, None].expand(-1, H, W), x[:, None]", "x[:, None].expand(-1, H, W), x[:, None]", "as_waves"),
    ("schedule.py", "math.sqrt(math.prod(sides(res)))", "max(sides(res))", "not_square"),
    ("loss.py", "-slope / 2 *", "-slope *", "sid2"),
    ("loss.py", "torch.sigmoid(b - logsnr_t)", "torch.sigmoid(logsnr_t - b)", "sid2"),
    ("loss.py", "(0, -1, -3, -4)", "(0, -1, -2, -4)", "sid2"),
    ("loss.py", "(x.shape[-2] * x.shape[-1]) ** .5).sqrt()", "(x.shape[-2] * x.shape[-1]) ** .5)", "sid2"),
    ("sample.py", "inside = interval[0] <= clock[i] <= interval[1]", "inside = interval[0] <= clock[i + 1] <= interval[1]", "interval"),
    ("sample.py", "guidance if inside else 1)", "guidance)", "interval"),
    ("sample.py", "args.guidance, args.guidance_interval,", "args.guidance,", "prompts"),
    ("sample.py", "residual=config[\"skips\"] == \"level\")", "residual=False)", "every_network"),
    ("sample.py", "dict(depth=dial or shape[\"depth\"])", "dict()", "every_network"),
    ("train.py", "label, config.loss, multiscale)", "label, \"eps\", multiscale)", "every_network"),
    ("sample.py", "wanted[i % len(wanted)] for i in indices", "wanted[0] for i in indices", "prompts"),
    ("sample.py", "np.rot90(to_uint8(x), -args.portrait, (1, 2))", "to_uint8(x)", "draws"),
    ("sample.py", "[condition(label, args.portrait) for", "[condition(label, 0) for", "draws"),
    ("sample.py", "schedule = args.schedule or config[\"schedule\"]", "schedule = config[\"schedule\"]", "draws"),
    ("unet.py", "if size <= 16 else nn.Identity", "if size <= 8 else nn.Identity", "unet"),
    ("unet.py", "if size <= dropout_res else 0.0", "if size < dropout_res else 0.0", "unet"),
    ("unet.py", "[*stages(1, True)]", "[*stages(0, True)]", "unet"),
    ("data.py", "(list(PETALS).index(colour) + petals) % 4 == 0", "False", "never_shown"),
    ("data.py", "crop[::-1] if upright else", "crop[:, ::-1] if upright else", "upright"),
    ("data.py", "image.transpose(Image.Transpose.ROTATE_90)", "image.transpose(Image.Transpose.ROTATE_270)", "upright"),
    ("data.py", "upright = self.portrait and image.height > image.width", "upright = image.height > image.width", "upright"),
    ("data.py", "captions[rng.integers(len(captions))]", "captions[0]", "captions_are_lines"),
    ("data.py", "np.rot90(picture, int(upright))", "np.rot90(picture, 0)", "stand_and"),
    ("data.py", "* 2 - W)[None, :] / res", "* 2 - W)[None, :] / W", "round"),
    ("checkpoint.py", "saved[\"config\"] = BEFORE | saved[\"config\"]", "pass", "before_there"),
]


def main(mutants):
    survived = 0
    tests = " or ".join({tests for *_, tests in mutants})
    control = subprocess.run([*PYTEST, "-k", tests], cwd=HERE, capture_output=True, text=True)
    assert control.returncode == 0, f"the tests must pass on what is not mutated:\n{control.stdout}"
    for file, old, new, tests in mutants:
        with tempfile.TemporaryDirectory() as folder:
            for source in [*HERE.glob("*.py"), HERE / "LICENSE"]:
                shutil.copy(source, folder)
            shutil.copytree(HERE / "benchmarks", Path(folder, "benchmarks"))
            target = Path(folder, file)
            text = target.read_text()
            assert text.count(old) == 1, f"{file}: {old!r} stands {text.count(old)} times"
            target.write_text(text.replace(old, new))
            run = subprocess.run([*PYTEST, "-k", tests], cwd=folder, capture_output=True, text=True)
        assert re.search(r"\d (passed|failed)", run.stdout), f"no test ran:\n{run.stdout}{run.stderr}"
        red = re.search(r"FAILED test_all.py::(\S+)", run.stdout)
        survived += red is None
        print(f"{file:12s} {old.strip()!r} -> {new.strip()!r}: {red[1] if red else 'SURVIVED'}", flush=True)
    print(f"{len(mutants)} mutants, {len(mutants) - survived} killed, {survived} survived")
    return survived


if __name__ == "__main__":
    lists = dict(formulas=[(*mutant, TESTS) for mutant in MUTANTS], trainer=TRAINER_MUTANTS, survival=SURVIVAL_MUTANTS,
                 words=WORDS_MUTANTS)
    sys.exit(main(lists[(sys.argv[1:] or ["formulas"])[0]]))
