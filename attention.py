"""softmax(q k^T / sqrt(head_dim)) v, in one of two ways."""
import torch
import torch.nn.functional as F


def dot_product_attention(q, k, v):
    """q, k, v: (B, heads, N, head_dim) each -> same. No dropout, no mask."""
    # On CPUs with bfloat16 in hardware PyTorch's kernel takes longer for few tokens.
    if q.is_cpu and q.dtype == torch.bfloat16 and q.shape[-2] <= 64:
        return (q @ k.mT / q.shape[-1]**.5).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)
