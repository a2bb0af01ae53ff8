"""Muon, the optimizer of `laptop`: its formula, which weights it has, what it keeps."""
import numpy as np
import pytest
import torch

import train
import uvit
from muon import Muon, orthogonalised
from tests.helpers import run_train, small_unet, small_uvit
from text import ByteEncoder

ADAM = dict(lr=1e-2, betas=(.9, .99), eps=1e-12)


@pytest.mark.parametrize("shape", [(2, 8, 8), (3, 6, 20), (1, 20, 6)])
def test_newton_schulz_keeps_singular_vectors_and_takes_values_through_its_polynomial(shape):
    matrices = torch.randn(shape, dtype=torch.float64)
    U, S, V = torch.linalg.svd(matrices, full_matrices=False)
    value = S / S.square().sum(-1, keepdim=True).sqrt()         # over the Frobenius norm
    for _ in range(5):
        value = 3.4445 * value - 4.7750 * value**3 + 2.0315 * value**5
    expected = U @ torch.diag_embed(value) @ V
    assert torch.allclose(orthogonalised(matrices), expected, atol=1e-5)
    assert .6 < value.min() and value.max() < 1.21


def test_muon_has_the_matrices_and_convolutions_of_hidden_layers_without_those_of_film():
    def names(model):
        ours = {id(weights) for weights in Muon(model, **ADAM).matrices}
        return {name for name, p in model.named_parameters() if id(p) in ours}
    model = small_uvit(64)
    places = ["down.0.0", "down.1.0", "down.1.1", "up.0.0", "up.0.1", "up.1.0"]
    blocks = [f"{place}.{conv}.weight" for place in places for conv in ("conv_in", "conv_out")]
    layers = [f"transformer.{i}.{layer}.weight" for i in (0, 1)
              for layer in ("0.linear_in", "0.linear_out", "1.qkv", "1.linear_out")]
    between = ["pool.0.1.weight", "pool.1.1.weight", "upsample.0.0.weight", "upsample.1.0.weight"]
    assert names(model) == {*blocks, *layers, *between}
    captions = names(small_uvit(64, text=ByteEncoder(9, 32)))
    assert {name.split(".")[2] for name in captions if name.startswith("transformer")} == set("012")
    for found in captions, names(small_unet()):
        assert not any("film" in name or name.startswith(("embedding", "text")) for name in found)


def gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def test_three_steps_are_those_of_the_formula_and_for_the_other_weights_those_of_adam():
    model, other = small_uvit(64), small_uvit(64)
    muon, adam = Muon(model, **ADAM), torch.optim.Adam(other.parameters(), **ADAM)
    ours = {id(weights) for weights in muon.matrices}
    before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    momentum = {name: torch.zeros_like(p) for name, p in before.items()}
    for seed in range(3):
        gradients(model, seed), gradients(other, seed)
        for name, p in model.named_parameters():
            if id(p) in ours:
                momentum[name] = .95 * momentum[name] + .05 * p.grad.double()
                matrix = (.95 * momentum[name] + .05 * p.grad.double()).flatten(1)
                step = orthogonalised(matrix[None])[0] * 1e-2 * np.sqrt(max(matrix.shape))
                before[name] -= step.view(p.shape)
        muon.step(), adam.step()
        muon.zero_grad(), adam.zero_grad()
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        if id(p) in ours:
            assert torch.allclose(p.double(), before[name], atol=1e-4), name
        else:
            assert torch.equal(p, q), name


def test_the_first_step_is_that_of_torch_s_muon():
    """torch's computes in bfloat16, with the size of a step as 0.2 sqrt(n)."""
    model, other = small_uvit(64), small_uvit(64)
    muon = Muon(model, **ADAM)
    layers = [(p, q) for p, q in zip(model.parameters(), other.parameters())
              if p.dim() == 2 and any(p is weights for weights in muon.matrices)]
    theirs = torch.optim.Muon([q for _, q in layers], lr=5e-2, weight_decay=0,
                              adjust_lr_fn="match_rms_adamw")
    gradients(model, 0), gradients(other, 0)
    start = [p.detach().clone() for p, _ in layers]
    muon.step(), theirs.step()
    for (p, q), was in zip(layers, start):
        assert (p - q).norm() < .03 * (q - was).norm()


def test_a_step_makes_the_elements_of_a_matrix_differ_by_about_lr():
    model = uvit.UViT(64, **uvit.PRESETS["laptop"]["network"], classes=10)
    muon, generator = Muon(model, **ADAM), torch.Generator().manual_seed(1)
    start = [weights.detach().clone() for weights in muon.matrices]
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    muon.step()
    for weights, was in zip(muon.matrices, start):
        assert .6 < (weights - was).square().mean().sqrt() / 1e-2 < 1.2


def test_in_bfloat16_a_step_is_nearly_that_in_float32():
    model, other = small_uvit(64), small_uvit(64)
    exact, rounded = Muon(model, **ADAM), Muon(other, bf16=True, **ADAM)
    gradients(model, 0), gradients(other, 0)
    start = [weights.detach().clone() for weights in exact.matrices]
    exact.step(), rounded.step()
    for p, q, was in zip(exact.matrices, rounded.matrices, start):
        assert 1e-4 < (p - q).norm() / (p - was).norm() < .05


def test_bf16_is_also_that_of_the_optimizer(tmp_path, little, monkeypatch):
    made = []
    monkeypatch.setattr(train, "Muon", lambda *args, **options: made.append(
        Muon(*args, **options)) or made[-1])
    for bf16 in ("on", "off"):
        run_train(tmp_path / bf16, *f"--steps 1 --set optimizer=muon bf16={bf16}".split())
    assert [muon.dtype for muon in made] == [torch.bfloat16, torch.float32]
