"""text.py: captions and their encoders."""
import copy
import os
import re
import shutil
import subprocess
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import checkpoint
import data
import flowers
import loss as losses
import run
import sample as sampling
import schedule
import text
import train
import uvit
from tests.helpers import (HERE, PYTHON, assert_same_bits, condition, one_line, random_weights,
                           run_train, small_uvit, write_folder)


@torch.enable_grad()
def captioned(length=24, **options):
    """A small U-ViT that reads bytes, trained for a few steps, so that its cross-attention is not
    zero any more; and a function: captions -> Condition.
    """
    torch.manual_seed(0)
    encoder = text.ByteEncoder(length, 64)
    model = small_uvit(classes=0, text=encoder, **options)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    tokens = text.tokenizer("bytes", length)
    cond = lambda *captions: condition(tokens=[tokens(caption) for caption in captions])
    for _ in range(5):
        loss = losses.diffusion_loss(
            model, torch.rand(3, 3, 32, 32), torch.rand(3), torch.randn(3, 3, 32, 32),
            schedule.logsnr_cosine, cond("a red flower", "blue", ""))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    return model.eval(), cond


# ---------------------------------------------------------------------------- the network

@torch.no_grad()
def test_masked_tokens_change_nothing_and_order_of_words_does():
    model, cond = captioned()
    z, logsnr = torch.randn(1, 3, 32, 32), torch.zeros(1)
    v_hat = lambda caption: model(z, logsnr, cond(caption))
    out = v_hat("red on blue")
    assert (v_hat("blue on red") - out).abs().max() > 1e-4
    assert (v_hat("red on blu") - out).abs().max() > 1e-4
    position = model.text.position.weight
    position[1 + len("red on blue"):] += torch.randn(64)        # of what is masked
    assert torch.equal(v_hat("red on blue"), out)
    position[len("red on blue")] += torch.randn(64)             # of the last that is not
    assert (v_hat("red on blue") - out).abs().max() > 1e-4


@torch.no_grad()
def test_empty_caption_is_the_dropped_one_and_no_caption():
    model, cond = captioned()
    z, logsnr = torch.randn(2, 3, 32, 32), torch.zeros(2)
    dropped = cond("a red flower", "blue").dropped(torch.tensor([True, True]))
    assert torch.equal(dropped.tokens, cond("", "").tokens)
    half = cond("a red flower", "blue").dropped(torch.tensor([True, False]))
    assert torch.equal(half.tokens, cond("", "blue").tokens)
    _, mask = model.text(cond("", "ab").tokens, 2)
    assert mask.sum(1).tolist() == [1, 3]                       # the first is always there
    empty = model(z, logsnr, cond("", ""))
    assert torch.equal(model(z, logsnr), empty) and empty.isfinite().all()
    assert torch.equal(model(z, logsnr, uvit.Condition()), empty)
    assert (model(z, logsnr, cond("a red flower", "")) - empty)[0].abs().max() > 1e-4


@torch.no_grad()
def test_mean_of_the_words_that_are_not_masked_is_added_to_the_embedding_of_logsnr():
    torch.manual_seed(0)
    embedding = random_weights(uvit.Embedding(16, 0, text_width=6)).float()
    (norm, linear), words = embedding.text, torch.randn(2, 3, 6)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    of_text, of_logsnr = [], []
    embedding.linear_out.register_forward_hook(lambda m, args, out: of_logsnr.append(out))
    embedding.text.register_forward_hook(lambda m, args, out: of_text.append((args[0], out)))
    out = embedding(torch.tensor([-1., 2.]), encoded=(words, mask))
    means = torch.stack([(words[0, 0] + words[0, 1]) / 2, words[1].mean(0)])
    torch.testing.assert_close(of_text[0][0], means)
    variance = means.var(1, keepdim=True, unbiased=False)
    centred = (means - means.mean(1, keepdim=True)) / (variance + 1e-5).sqrt()
    by_hand = (centred * norm.weight + norm.bias) @ linear.weight.T + linear.bias
    torch.testing.assert_close(of_text[0][1], by_hand)
    torch.testing.assert_close(out, F.silu(of_logsnr[0] + of_text[0][1]))


def layer_norm(x, norm):
    variance = x.var(-1, keepdim=True, unbiased=False)
    return (x - x.mean(-1, keepdim=True)) / (variance + 1e-5).sqrt() * norm.weight + norm.bias


def rms_norm(x, weight):
    return x / x.square().mean(-1, keepdim=True).sqrt() * weight


@torch.no_grad()
def test_cross_attention_attends_to_what_is_not_masked_with_normalised_q_and_k():
    torch.manual_seed(0)
    block = random_weights(text.CrossAttentionBlock(8, 4, 6)).float()
    x, words = torch.randn(1, 5, 8), torch.randn(1, 4, 6)
    mask = torch.tensor([[True, False, True, True]])
    queries = (layer_norm(x, block.norm) @ block.q.weight.T + block.q.bias)[0]
    keys_values = layer_norm(words, block.norm_text) @ block.kv.weight.T + block.kv.bias
    keys_values, out = keys_values[0][mask[0]], torch.zeros(5, 8)
    for head in (slice(0, 4), slice(4, 8)):
        q, k, v = queries[:, head], keys_values[:, :8][:, head], keys_values[:, 8:][:, head]
        logits = rms_norm(q, block.norm_q.weight) @ rms_norm(k, block.norm_k.weight).T / 2
        out[:, head] = torch.softmax(logits, -1) @ v
    by_hand = x + out @ block.linear_out.weight.T + block.linear_out.bias
    assert torch.allclose(block(x, words, mask), by_hand, atol=1e-4)
    assert text.CrossAttentionBlock(8, 4, 6)(x, words, mask).equal(x)       # nothing at the start


# ---------------------------------------------------------------------------- tokens, T5

def test_caption_is_utf8_bytes_plus_1_cut_or_filled_with_0():
    tokens = lambda caption, length: text.tokenizer("bytes", length)(caption)
    assert tokens("aé", 6) == [98, 196, 170, 0, 0, 0]
    assert tokens("abc", 2) == [98, 99] and tokens("", 3) == [0, 0, 0]
    assert max(tokens("\udcff\uffff", 4)) <= 256


@pytest.fixture(scope="module")
def tiny_t5(tmp_path_factory):
    """A T5 of random weights with a tokenizer of a few words, on disk."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("t5")
    words = "<pad> </s> <unk> a red blue flower with seven petals".split()
    words = {word: i for i, word in enumerate(words)}
    tokens = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokens.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokens.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", eos_token="</s>",
        unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=len(words), d_model=24, d_kv=8, d_ff=32,
                                   num_layers=2, num_heads=3)
    transformers.T5EncoderModel(config).save_pretrained(folder)
    return folder


def test_t5_gives_its_last_hidden_state_and_is_frozen(tiny_t5):
    transformers = pytest.importorskip("transformers")
    encoder, tokens = (make(f"t5:{tiny_t5}", 12, *more) for make, more in
                       ((text.text_encoder, [0]), (text.tokenizer, [])))
    assert encoder.width == 24 and tokens("a red flower") == [3, 4, 6, 1] + 8 * [0]
    assert tokens("") == 12 * [0] and tokens("a " * 50) == 11 * [3] + [1]
    rows = torch.tensor([tokens("a red flower"), tokens("")])
    h, mask = encoder(rows, 2)
    original = transformers.T5EncoderModel.from_pretrained(tiny_t5).eval()
    expected = original(input_ids=rows[:1, :4]).last_hidden_state
    assert h.shape == (2, 13, 24) and not h.requires_grad
    assert mask.tolist() == [5 * [True] + 8 * [False], [True] + 12 * [False]]
    assert torch.allclose(h[0, 1:5], expected[0], atol=1e-5)
    nothing = encoder(None, 2)
    assert_same_bits(list(nothing), list(encoder(torch.zeros_like(rows), 2)))
    encoder.encoder = copy.deepcopy(encoder.encoder).bfloat16()     # as large ones are saved
    encoder.last_tokens = None
    assert encoder(rows, 2)[0].dtype == torch.float32
    assert torch.allclose(encoder(rows, 2)[0], h, atol=.1)


def test_run_with_t5_keeps_it_out_of_the_checkpoint_resumes_and_draws(
        tmp_path, tiny_t5, little, capsys, monkeypatch):
    transformers = pytest.importorskip("transformers")
    flags = ["--steps", "3", "--text", f"t5:{tiny_t5}", "--set", "text_length=12",
             "--save-every", "2"]
    made, original = [], train.build_network
    with monkeypatch.context() as patched:
        patched.setattr(train, "build_network",
                        lambda **numbers: made.append(original(**numbers)) or made[0])
        saved = run_train(tmp_path / "run", *flags)
    assert not any(name.startswith("text.") for name in saved["model"])
    assert any(".2.kv." in name for name in saved["model"])
    untrained = transformers.T5EncoderModel.from_pretrained(tiny_t5)
    assert_same_bits(made[0].text.encoder.state_dict(), untrained.state_dict())

    shutil.copytree(tmp_path / "run", tmp_path / "resumed")
    (tmp_path / "resumed/ckpt-00000003.pt").unlink()
    assert_same_bits(saved["model"], run_train(tmp_path / "resumed", *flags)["model"])

    sampling.main(["--ckpt", str(tmp_path / "run/model.pt"), "--prompt", "a red flower",
                   "a blue flower", "--guidance", "2", "--steps", "2",
                   "--out", str(tmp_path / "pictures")])
    assert (tmp_path / "pictures/000001.png").exists()

    gone = checkpoint.read(tmp_path / "run/model.pt")
    gone["config"]["text"] = gone["network"]["text"] = f"t5:{tmp_path}/gone"
    torch.save(gone, tmp_path / "gone.pt")
    error = one_line(capsys, sampling.main, ["--ckpt", tmp_path / "gone.pt", "--prompt", "a"])
    assert "gone: cannot be read" in error


def test_a_file_cannot_make_a_t5_be_downloaded_but_an_option_can(
        tmp_path, tiny_t5, little, capsys, monkeypatch):
    transformers = pytest.importorskip("transformers")
    text.LOADED.clear()
    asked = []
    for kind in ("AutoConfig", "AutoTokenizer", "T5EncoderModel"):
        honest = getattr(transformers, kind).from_pretrained
        monkeypatch.setattr(getattr(transformers, kind), "from_pretrained",
                            lambda name, kind=kind, honest=honest, **options:
                            asked.append((kind, options.get("local_files_only")))
                            or honest(name, **options))
    flags = ["--text", f"t5:{tiny_t5}", "--set", "text_length=12"]
    run_train(tmp_path / "run", "--steps", "1", *flags)
    every = {"AutoConfig", "AutoTokenizer", "T5EncoderModel"}
    assert set(asked) - {(kind, None) for kind in every} == {(kind, False) for kind in every}
    asked.clear()
    sampling.main(["--ckpt", str(tmp_path / "run/model.pt"), "--prompt", "a red flower",
                   "--steps", "1", "--out", str(tmp_path / "pictures")])
    text.LOADED.clear()
    assert run.settings_of_started_run(tmp_path / "run")
    assert set(asked) - {(kind, None) for kind in every} == {(kind, True) for kind in every}
    other = checkpoint.read(tmp_path / "run/model.pt")
    other["config"]["text"] = other["network"]["text"] = "t5:nobody/nothing"
    torch.save(other, tmp_path / "other.pt")
    error = one_line(capsys, sampling.main, ["--ckpt", tmp_path / "other.pt", "--prompt", "a"])
    assert "t5:nobody/nothing: cannot be read" in error and "hf download nobody/nothing" in error


def test_t5_is_imported_only_for_t5():
    code = ("import sys; import train; from checkpoint import build_network; from config import *; "
            "build_network(**Config(model='tiny', text='bytes').network_settings(0)); "
            "assert 'transformers' not in sys.modules")
    assert subprocess.run([*PYTHON, "-c", code], cwd=HERE).returncode == 0


# ---------------------------------------------------------------------------- settings

@pytest.mark.parametrize("flags, expected", [
    ("", (2, 4, {0.1}, 0)),
    ("--set patch=conv", (0, 4, {0.1}, 0)),
    ("--set patch=none", (0, 6, {0.1}, 0)),
    ("--set blocks_16=3", (2, 4, {0.1}, 0, 3)),
    ("--set largest_map=64", (3, 3, {0.1}, 0)),
    ("--set dropout=0.3", (2, 4, {0.3}, 0)),
    ("--set dropout=0.3 dropout_res=32", (2, 4, {0.3}, 1)),
    ("--portrait --res 384x640", (2, 4, {0.1}, 0)),
    ("--set architecture=unet", (2, 5, {0.1}, 2)),
    ("--set architecture=unet dropout=0.3", (2, 5, {0.3}, 2)),
    ("--set architecture=unet dropout=0", (2, 5, set(), 0)),
    ("--set architecture=unet blocks_16=3 patch=none", (0, 7, {0.1}, 2, 3)),
    ("--set architecture=unet --model paper", (2, 5, {0.1}, 2)),
    ("--model tiny", (2, 4, set(), 0))])
def test_settings_of_the_network_reach_it(flags, expected):
    """expected: levels of the wavelet, levels of the network, dropouts above 0, on how many levels
    of ResBlocks there is dropout, blocks at 16.
    """
    config = train.parse_config(["--res", "512", "--model", "small", *flags.split()])
    with torch.device("meta"):
        model = checkpoint.build_network(**config.network_settings(7))
    levels, depth, dropouts, dropped, *blocks_16 = expected

    def dropouts_of(part):
        return {layer.p for layer in part.modules() if isinstance(layer, torch.nn.Dropout)} - {0}

    uvit_is_it = config.architecture == "uvit"
    assert model.wavelet_levels == levels and len(model.down) + uvit_is_it == depth
    assert dropouts_of(model) == dropouts
    assert sum(bool(dropouts_of(level)) for level in model.down) == dropped
    assert (model.embedding.portrait is not None) == config.portrait
    assert model.embedding.classes == 7
    blocks = len(model.transformer) if uvit_is_it else len(model.down[-2])
    usual = 12 if not uvit_is_it else 8 if config.model == "small" else 4
    assert blocks == (blocks_16 or [usual])[0]


# ---------------------------------------------------------------------------- captions of pictures

def write_captioned(folder):
    """Pictures with captions beside them: two lines each, of the last one none."""
    write_folder(folder)
    for i, file in enumerate(sorted(folder.rglob("*.png"))[:-1]):
        file = file.with_suffix(".TXT" if i else ".txt")
        file.write_text(f"  picture\t{i} \n\nnumber {i}", encoding="utf-8-sig")


def caption_of(tokens):
    """Bytes plus 1, filled up with 0 -> the caption."""
    return bytes(byte - 1 for byte in tokens if byte).decode()


def test_captions_are_lines_of_the_txt_beside_in_a_folder_and_in_a_zip(tmp_path):
    write_captioned(tmp_path / "set")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for file in (tmp_path / "set").rglob("*.*"):
            archive.writestr(f"./{file.relative_to(tmp_path / 'set')}", file.read_bytes())
    tokens, captions = text.tokenizer("bytes", 16), {}
    for path in ("set", "set.zip"):
        dataset = data.Pictures(tmp_path / path, 16, tokens=tokens)
        conditions = [dataset[n][1] for n in range(200)]
        assert dataset.classes == []
        assert all(cond[:2] == (-1, 0) and len(cond.tokens) == 16 for cond in conditions)
        captions[path] = [caption_of(cond.tokens) for cond in conditions]
    numbers = range(len(dataset.names) - 1)
    assert set(captions["set"]) == {"", *(f"picture {i}" for i in numbers),
                                    *(f"number {i}" for i in numbers)}
    assert captions["set"] == captions["set.zip"]


def test_a_picture_whose_caption_cannot_be_read_is_skipped_and_named(tmp_path):
    write_captioned(tmp_path)
    bad, gone = sorted(tmp_path.rglob("*.TXT"))[:2]
    bad.unlink(), gone.unlink()
    os.mkfifo(bad)                                          # would wait for ever
    gone.symlink_to(tmp_path / "nowhere")
    dataset = data.Pictures(tmp_path, 16, tokens=text.tokenizer("bytes", 16))
    skipped = {}
    for n in range(len(dataset.names)):
        skipped |= dataset[n][2]
    assert dataset.captioned == len(dataset.names) - 1
    name = lambda file: file.relative_to(tmp_path).as_posix()
    missing = f"FileNotFoundError: [Errno 2] No such file or directory: '{gone}'"
    assert skipped == {
        name(file.with_suffix(".png")): f"ValueError: its caption {name(file)}: {why}"
        for file, why in ((bad, "ValueError: not a file"), (gone, missing))}


def test_captions_describe_the_flowers_and_a_quarter_of_the_combinations_is_never_shown():
    dataset = flowers.Flowers(16, tokens=text.tokenizer("bytes", 64))
    captions = [caption_of(dataset[n][1].tokens) for n in range(2000)]
    pattern = re.compile(r"a (\w+) flower with (\w+) (?:(?:round|pointed) )?petals"
                         r"(?:, speckled,)?(?: on [a-z ]+)?")
    shown = set()
    for caption in captions:
        colour, number = pattern.fullmatch(caption).groups()
        petals = int(number) if number.isdecimal() else flowers.NUMBERS.index(number) + 3
        shown.add((colour, petals))
    hidden = {(colour, k) for colour in flowers.PETALS for k in range(3, 13)} - shown
    assert len(hidden) == 20 and all(flowers.never_shown(*pair) for pair in hidden)
    assert {k for _, k in hidden} == set(range(3, 13))
    assert {colour for colour, _ in hidden} == set(flowers.PETALS)
    assert dataset.classes == [] and len(set(map(len, captions))) > 10


@torch.no_grad()
def test_bundled_words_know_colour_and_number():
    """assets/words.pt on 40 new flowers: x_hat is best with the right caption, and worse with
    another colour or another number in it.
    """
    path = HERE / "assets" / "words.pt"
    assert path.stat().st_size < 16e6
    model, saved = checkpoint.load_model(path, "cpu")
    assert {weights.dtype for weights in saved["ema"].values()} == {torch.bfloat16}
    assert saved["config"]["out"] == ""
    tokens, names = text.tokenizer("bytes", saved["config"]["text_length"]), list(flowers.PETALS)
    pictures, rows = [], {"right": [], "number": [], "colour": []}
    for i in range(40):
        rng = np.random.default_rng((12345, i))
        picture, caption = flowers.draw_flower(rng, 3 + i % 10, saved["config"]["res"])
        pictures.append(torch.from_numpy(picture).permute(2, 0, 1) * 2 - 1)
        colour = caption.split()[1]
        other = names[(names.index(colour) + 3) % len(names)]
        for kind, c, k in (("right", colour, i % 10), ("number", colour, (i + 4) % 10),
                           ("colour", other, i % 10)):
            rows[kind].append(tokens(f"a {c} flower with {flowers.NUMBERS[k]} petals"))
    x, logsnr = torch.stack(pictures).float(), torch.full((40,), -1.)
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    alpha, sigma = schedule.alpha_sigma(logsnr)
    z, error = alpha * x + sigma * eps, {}
    for kind, captions in rows.items():
        v_hat = model(z, logsnr, condition(tokens=captions))
        error[kind] = (losses.x_from_v(z, v_hat, alpha, sigma) - x).square().mean()
    assert error["right"] < .03 and error["number"] > 1.1 * error["right"], error
    assert error["colour"] > 1.1 * error["right"], error
