"""text.py: captions and their encoders."""
import os
import re
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import checkpoint
import data
import loss as losses
import sample as sampling
import schedule
import text
import train
import uvit
from test_all import HERE, LITTLE, assert_same_bits, one_line, random_weights, run_train, small_uvit, write_folder


@torch.enable_grad()
def captioned(length=24, **options):
    """A small U-ViT that reads bytes, a few steps trained, so that its cross-attention has left zero; row(words)."""
    torch.manual_seed(0)
    encoder = text.ByteEncoder(length, 64)
    model = small_uvit(classes=0, text=encoder, **options)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    tokens = text.tokenizer("bytes", length)
    row = lambda *captions: torch.stack([text.condition(0, 0, tokens(caption)) for caption in captions])
    for _ in range(5):
        loss = losses.diffusion_loss(model, torch.rand(3, 3, 32, 32), torch.rand(3), torch.randn(3, 3, 32, 32), schedule.logsnr_cosine,
                                     row("a red flower", "blue", ""))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    return model.eval(), row


@torch.no_grad()
def test_masked_tokens_change_nothing_and_order_of_words_does():
    model, row = captioned()
    z, logsnr = torch.randn(1, 3, 32, 32), torch.zeros(1)
    say = lambda caption: model(z, logsnr, row(caption))
    out = say("red on blue")
    assert (say("blue on red") - out).abs().max() > 1e-4 and (say("red on blu") - out).abs().max() > 1e-4
    model.text.position.weight[1 + len("red on blue"):] += torch.randn(64)   # of what is masked
    assert torch.equal(say("red on blue"), out)
    model.text.position.weight[len("red on blue")] += torch.randn(64)       # of the last that is not
    assert (say("red on blue") - out).abs().max() > 1e-4


@torch.no_grad()
def test_empty_caption_is_the_dropped_one_and_no_caption():
    model, row = captioned()
    z, logsnr = torch.randn(2, 3, 32, 32), torch.zeros(2)
    assert torch.equal(text.unconditional(row("a red flower", "blue"), model.classes), row("", ""))
    assert model.text(row("", "ab")[:, 2:])[1].sum(1).tolist() == [1, 3]         # the first of a sequence is always there
    empty = model(z, logsnr, row("", ""))
    assert torch.equal(model(z, logsnr), empty) and empty.isfinite().all()
    assert (model(z, logsnr, row("a red flower", "")) - empty)[0].abs().max() > 1e-4


@torch.no_grad()
def test_what_a_caption_says_on_the_whole_is_the_mean_of_what_is_seen_and_joins_the_clock():
    torch.manual_seed(0)
    embedding = random_weights(uvit.Embedding(16, 0, text=6)).float()
    (norm, linear), words = embedding.text, torch.randn(2, 3, 6)
    seen = torch.tensor([[True, True, False], [True, True, True]])
    given, clock = [], []
    embedding.linear_out.register_forward_hook(lambda m, args, out: clock.append(out))
    embedding.text.register_forward_hook(lambda m, args, out: given.append((args[0], out)))
    out = embedding(torch.tensor([-1., 2.]), torch.zeros(2, 2), words, seen)
    means = torch.stack([(words[0, 0] + words[0, 1]) / 2, words[1].mean(0)])
    torch.testing.assert_close(given[0][0], means)
    centred = (means - means.mean(1, keepdim=True)) / (means.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(given[0][1], (centred * norm.weight + norm.bias) @ linear.weight.T + linear.bias)
    torch.testing.assert_close(out, F.silu(clock[0] + given[0][1]))


def test_caption_is_utf8_bytes_plus_1_cut_or_filled_with_0():
    assert text.tokenizer("bytes", 6)("aé") == [98, 196, 170, 0, 0, 0]
    assert text.tokenizer("bytes", 2)("abc") == [98, 99] and text.tokenizer("bytes", 3)("") == [0, 0, 0]
    assert max(text.tokenizer("bytes", 4)("\udcff\uffff")) <= 256


@torch.no_grad()
def test_cross_attention_reads_what_is_seen_with_normalised_q_and_k():
    torch.manual_seed(0)
    block = random_weights(uvit.CrossAttentionBlock(8, 4, 6)).float()
    x, words, seen = torch.randn(1, 5, 8), torch.randn(1, 4, 6), torch.tensor([[True, False, True, True]])
    norm = lambda a, by: (a - a.mean(-1, keepdim=True)) / (a.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt() * by.weight + by.bias
    rms = lambda a, weight: a / a.square().mean(-1, keepdim=True).sqrt() * weight
    queries = (norm(x, block.norm) @ block.q.weight.T + block.q.bias)[0]
    keys_values, out = (norm(words, block.norm_text) @ block.kv.weight.T + block.kv.bias)[0][seen[0]], torch.zeros(5, 8)
    for head in (0, 1):
        q, k, v = queries[:, 4 * head:4 * head + 4], keys_values[:, 4 * head:4 * head + 4], keys_values[:, 8 + 4 * head:12 + 4 * head]
        out[:, 4 * head:4 * head + 4] = torch.softmax(rms(q, block.norm_q.weight) @ rms(k, block.norm_k.weight).T / 2, -1) @ v
    by_hand = x + out @ block.linear_out.weight.T + block.linear_out.bias
    assert torch.allclose(block(x, words, seen), by_hand, atol=1e-4)
    assert uvit.CrossAttentionBlock(8, 4, 6)(x, words, seen).equal(x)       # nothing at the start


@pytest.fixture(scope="module")
def tiny_t5(tmp_path_factory):
    """A T5 of random weights with a tokenizer of a few words, on disk."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("t5")
    words = {word: i for i, word in enumerate("<pad> </s> <unk> a red blue flower with seven petals".split())}
    tokens = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokens.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokens.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=len(words), d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3)
    transformers.T5EncoderModel(config).save_pretrained(folder)
    return folder


def test_t5_has_the_same_interface_is_frozen_and_not_in_the_checkpoint(tmp_path, tiny_t5, little, capsys, monkeypatch):
    transformers = pytest.importorskip("transformers")
    encoder, tokens = text.text_encoder(f"t5:{tiny_t5}", 12, 0), text.tokenizer(f"t5:{tiny_t5}", 12)
    assert encoder.width == 24 and tokens("a red flower") == [3, 4, 6, 1] + 8 * [0] and tokens("") == 12 * [0]
    assert tokens("a " * 50) == 11 * [3] + [1]
    rows = torch.tensor([tokens("a red flower"), tokens("")])
    h, seen = encoder(rows)
    whole = transformers.T5EncoderModel.from_pretrained(tiny_t5).eval()(input_ids=rows[:1, :4]).last_hidden_state
    assert h.shape == (2, 13, 24) and seen.tolist() == [5 * [True] + 8 * [False], [True] + 12 * [False]]
    assert torch.allclose(h[0, 1:5], whole[0], atol=1e-5) and not h.requires_grad
    encoder.last = encoder.encoder.bfloat16() and (None, None)                  # as large ones are saved
    assert encoder(rows)[0].dtype == torch.float32 and torch.allclose(encoder(rows)[0], h, atol=.1)
    made, honest = [], train.network
    monkeypatch.setattr(train, "network", lambda *args: made.append(honest(*args)) or made[0])
    saved = run_train(tmp_path / "run", "--steps", "3", "--text", f"t5:{tiny_t5}", "--text-length", "12", "--save-every", "2")
    assert not any(name.startswith("text.") for name in saved["model"]) and any(".2.kv." in name for name in saved["model"])
    assert_same_bits(made[0].text.encoder.state_dict(), transformers.T5EncoderModel.from_pretrained(tiny_t5).state_dict())
    monkeypatch.undo()
    monkeypatch.setitem(uvit.PRESETS, "tiny", LITTLE)
    shutil.copytree(tmp_path / "run", tmp_path / "resumed")
    (tmp_path / "resumed/ckpt-00000003.pt").unlink()
    again = run_train(tmp_path / "resumed", "--steps", "3", "--text", f"t5:{tiny_t5}", "--text-length", "12", "--save-every", "2")
    assert_same_bits(saved["model"], again["model"])
    sampling.main(["--ckpt", str(tmp_path / "run/model.pt"), "--prompt", "a red flower", "a blue flower", "--guidance", "2",
                   "--steps", "2", "--out", str(tmp_path / "pictures")])
    assert (tmp_path / "pictures/000001.png").exists()
    gone = checkpoint.read(tmp_path / "run/model.pt")
    gone["config"]["text"] = f"t5:{tmp_path}/gone"
    torch.save(gone, tmp_path / "gone.pt")
    assert "gone: cannot be read" in one_line(capsys, sampling.main, ["--ckpt", tmp_path / "gone.pt", "--prompt", "a"])


def test_t5_is_imported_only_for_t5():
    code = "import sys; import train; train.network(vars(train.Config(model='tiny', text='bytes')), 0); assert 'transformers' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE).returncode == 0


@pytest.mark.parametrize("flags, tells", [
    ("", (2, 4, {0.1}, 0)), ("--patch conv", (0, 4, {0.1}, 0)), ("--patch none", (0, 6, {0.1}, 0)), ("--blocks-16 3", (2, 4, {0.1}, 0, 3)),
    ("--dropout 0.3", (2, 4, {0.3}, 0)), ("--dropout 0.3 --dropout-res 32", (2, 4, {0.3}, 1)), ("--portrait --res 384x640", (2, 4, {0.1}, 0)),
    ("--net unet", (2, 5, {0.1}, 2)), ("--net unet --dropout 0.3", (2, 5, {0.3}, 2)), ("--net unet --dropout 0", (2, 5, set(), 0)),
    ("--net unet --blocks-16 3 --patch none", (0, 7, {0.1}, 2, 3)), ("--net unet --model paper", (2, 5, {0.1}, 2)),
    ("--model tiny", (2, 4, set(), 0))])
def test_flags_of_the_network_reach_it(flags, tells):
    """tells: wavelet levels, levels of the network, dropouts above 0, on how many levels of the ResBlocks, blocks at 16."""
    config = train.parse_config(["--res", "512", "--model", "small", *flags.split()])
    with torch.device("meta"):
        model = sampling.network(vars(config), 7)
    levels, depth, drops, dropped, *dial = tells
    probabilities = lambda part: {layer.p for layer in part.modules() if isinstance(layer, torch.nn.Dropout)} - {0}
    assert (model.levels, len(model.down) + (config.net == "uvit"), probabilities(model)) == (levels, depth, drops)
    assert sum(bool(probabilities(level)) for level in model.down) == dropped and (model.embedding.portrait is not None) == config.portrait
    blocks = len(model.transformer) if config.net == "uvit" else len(model.down[-2])
    assert blocks == (dial or [8 if config.net == "uvit" and config.model == "small" else 4 if config.net == "uvit" else 12])[0]


def write_captioned(folder):
    """Ten pictures with captions beside them: two lines each, of the last one none."""
    write_folder(folder)
    for i, file in enumerate(sorted(folder.rglob("*.png"))[:-1]):
        file.with_suffix(".TXT" if i else ".txt").write_text(f"  picture\t{i} \n\nnumber {i}", encoding="utf-8-sig")


def test_captions_are_lines_of_the_txt_beside_in_a_folder_and_in_a_zip(tmp_path):
    write_captioned(tmp_path / "set")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for file in (tmp_path / "set").rglob("*.*"):
            archive.writestr(f"./{file.relative_to(tmp_path / 'set')}", file.read_bytes())
    tokens = text.tokenizer("bytes", 16)
    told = {}
    for path in ("set", "set.zip"):
        dataset = data.Pictures(tmp_path / path, 16, tokens=tokens)
        rows = [dataset[n][1] for n in range(200)]
        assert dataset.classes == [] and all(row.shape == (18,) and row[:2].tolist() == [0, 0] for row in rows)
        told[path] = [bytes(byte - 1 for byte in row[2:].tolist() if byte).decode() for row in rows]
    count = len(dataset.names) - 1
    assert set(told["set"]) == {"", *(f"picture {i}" for i in range(count)), *(f"number {i}" for i in range(count))}
    assert told["set"] == told["set.zip"]


def test_a_picture_whose_caption_cannot_be_read_is_skipped_and_says_so(tmp_path):
    write_captioned(tmp_path)
    bad, gone = sorted(tmp_path.rglob("*.TXT"))[:2]
    bad.unlink(), gone.unlink()
    os.mkfifo(bad)                                          # would wait for ever
    gone.symlink_to(tmp_path / "nowhere")
    dataset, seen = data.Pictures(tmp_path, 16, tokens=text.tokenizer("bytes", 16)), {}
    for n in range(len(dataset.names)):
        seen |= dataset[n][2]
    assert dataset.captioned == len(dataset.names) - 1
    assert seen == {file.relative_to(tmp_path).with_suffix(".png").as_posix(): f"ValueError: its caption {file.relative_to(tmp_path).as_posix()}: {why}"
                    for file, why in ((bad, "ValueError: not a file"), (gone, f"FileNotFoundError: [Errno 2] No such file or directory: '{gone}'"))}


def test_flowers_say_what_they_are_and_a_quarter_of_the_combinations_is_never_shown():
    words = lambda row: bytes(byte - 1 for byte in row[2:].tolist() if byte).decode()
    dataset = data.Flowers(16, tokens=text.tokenizer("bytes", 64))
    said = [words(dataset[n][1]) for n in range(2000)]
    pattern = re.compile(r"a (\w+) flower with (\w+) (?:(?:round|pointed) )?petals(?:, speckled,)?(?: on [a-z ]+)?")
    shown = set()
    for caption in said:
        colour, number = pattern.fullmatch(caption).groups()
        shown.add((colour, int(number) if number.isdecimal() else data.NUMBERS.index(number) + 3))
    hidden = {(colour, k) for colour in data.PETALS for k in range(3, 13)} - shown
    assert len(hidden) == 20 and all(data.never_shown(*pair) for pair in hidden)
    assert {k for _, k in hidden} == set(range(3, 13)) and {colour for colour, _ in hidden} == set(data.PETALS)
    assert dataset.classes == [] and len(set(map(len, said))) > 10


@torch.no_grad()
def test_released_words_know_colour_and_number():
    """assets/words.pt on 40 flowers it has not seen: the right caption helps, and so does its number alone."""
    path = HERE / "assets" / "words.pt"
    assert path.stat().st_size < 16e6
    model, saved = sampling.load_model(path, "cpu")
    assert {weights.dtype for weights in saved["ema"].values()} == {torch.bfloat16} and saved["config"]["out"] == ""
    tokens, pictures, told = text.tokenizer("bytes", saved["config"]["text_length"]), [], {"right": [], "number": [], "colour": []}
    for i in range(40):
        picture, caption = data.draw_flower(np.random.default_rng((12345, i)), 3 + i % 10, saved["config"]["res"])
        pictures.append(torch.from_numpy(picture).permute(2, 0, 1) * 2 - 1)
        colour, names = caption.split()[1], list(data.PETALS)
        other = names[(names.index(colour) + 3) % len(names)]
        for kind, c, k in ("right", colour, i % 10), ("number", colour, (i + 4) % 10), ("colour", other, i % 10):
            told[kind].append(text.condition(0, 0, tokens(f"a {c} flower with {data.NUMBERS[k]} petals")))
    x, logsnr = torch.stack(pictures).float(), torch.full((40,), -1.)
    eps, (alpha, sigma) = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)), schedule.alpha_sigma(logsnr)
    z = alpha * x + sigma * eps
    error = {kind: (losses.x_from_v(z, model(z, logsnr, torch.stack(rows)), alpha, sigma) - x).square().mean() for kind, rows in told.items()}
    assert error["right"] < .03 and error["number"] > 1.1 * error["right"] and error["colour"] > 1.1 * error["right"], error
