"""Muon (Jordan et al., 2024), the optimizer of `laptop`. Not in the paper, which has Adam alone.

Most of the eps loss, and of its gradient, comes from nearly clean pictures. Adam learns what such
gradients drown, the shape of a picture in much noise, only late. Muon takes a step of about equal
size along all singular directions of a matrix's gradient G but the weakest:

    M <- mu M + (1 - mu) G,    U S V^T = (1 - mu) G + mu M,    W <- W - lr sqrt(n) U V^T

n is the larger side of W: the elements of a step have a root mean square of at most about lr.
torch.optim.Muon takes no convolutions, and computes in bfloat16, which is 25 times as slow on a CPU
without it.
"""
from collections import defaultdict

import torch

OTHERS = ("project_", "embedding.", "text.", "position")    # first and last layer, conditioning


def orthogonalised(matrices, steps=5):
    """U V^T of matrices U S V^T (N, rows, columns), by Newton-Schulz iteration.

    An odd polynomial of X takes its singular values towards 1: those above 0.0015 of the matrix's
    norm to between 0.68 and 1.21, smaller ones are only enlarged.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    X = matrices.mT if tall else matrices
    X = X / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315), X, beta=3.4445)
    return X.mT if tall else X


def state_names(optimizer, weights):
    """What Muon or Adam keeps of these weights between steps."""
    ours = any(weights is matrix for matrix in getattr(optimizer, "matrices", ()))
    return ("step", "momentum") if ours else ("step", "exp_avg", "exp_avg_sq")


class Muon(torch.optim.Adam):
    """Muon for matrices and convolutions (as matrices: C_out, C_in 9) of the hidden layers, without
    those of FiLM; Adam for all other parameters. model: a UViT or UNet; bf16: iterate in
    bfloat16; options: Adam's.
    """

    def __init__(self, model, lr, momentum=0.95, bf16=False, **options):
        super().__init__(model.parameters(), lr, **options)
        self.momentum, self.dtype = momentum, torch.bfloat16 if bf16 else torch.float32
        self.matrices = [weights for name, weights in model.named_parameters() if weights.dim() > 1
                         and not name.startswith(OTHERS) and ".film." not in name]
        for weights in self.matrices:                   # Adam needs a "step" to load a state
            self.state[weights] = dict(step=torch.zeros(()), momentum=torch.zeros_like(weights))

    @torch.no_grad()
    def step(self):
        gradients = [weights.grad for weights in self.matrices]
        for weights in self.matrices:
            weights.grad = None                         # Adam leaves these out
        super().step()
        if getattr(self, "found_inf", 0):               # see ranks.step_if_finite; waits for a GPU
            return
        alike = defaultdict(list)                       # shape: weights, matrix
        for weights, gradient in zip(self.matrices, gradients):
            momentum = self.state[weights]["momentum"].lerp_(gradient, 1 - self.momentum)
            matrix = gradient.lerp(momentum, self.momentum).flatten(1)
            alike[matrix.shape].append((weights, matrix))
        for shape, group in alike.items():
            steps = orthogonalised(torch.stack([matrix for _, matrix in group]).to(self.dtype))
            size = self.param_groups[0]["lr"] * max(shape) ** .5
            for (weights, _), step in zip(group, steps):
                weights.sub_(step.view(weights.shape), alpha=size)
