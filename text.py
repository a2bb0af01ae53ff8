"""Captions (Section 3.6): tokens, and the encoders whose output the transformer attends to.

A caption is L whole numbers, filled up with 0; all 0 is the empty caption, which also a dropped
one becomes. An encoder turns it into a sequence of embeddings and says which of them count:

    tokens (B, L) or None -> text (B, 1 + L, T), mask (B, 1 + L) bool

The first embedding is always there, so that attention to an empty caption is defined; the others
count where the token is not 0. Two encoders:

    bytes       not in the paper: a small transformer over UTF-8 bytes, trained with the network
    t5:NAME     the paper's: a frozen T5 that the package `transformers` finds by its name or folder
"""
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from uvit import zero


def byte_tokens(caption, length):
    """Caption -> list of `length` numbers: its UTF-8 bytes plus 1, cut or filled up with 0."""
    codes = [byte + 1 for byte in caption.encode("utf-8", "replace")[:length]]
    return codes + [0] * (length - len(codes))


def checked(tokens, batch, length, device):
    """Tokens (batch, length); of None all 0."""
    if tokens is None:
        return torch.zeros(batch, length, dtype=torch.long, device=device)
    assert tokens.shape == (batch, length), \
        f"tokens must be {(batch, length)}, not {tuple(tokens.shape)}"
    return tokens


class CrossAttentionBlock(nn.Module):
    """Attention to a caption (Section 3.6): x (B, N, C), text (B, L, T), mask (B, L) -> as x.

    The U-ViT has one after each self-attention block, with the same normalised q and k.
    """

    def __init__(self, width, head_dim, text_width):
        super().__init__()
        self.head_dim = head_dim
        self.norm, self.norm_text = nn.LayerNorm(width), nn.LayerNorm(text_width)
        self.q, self.kv = nn.Linear(width, width), nn.Linear(text_width, 2 * width)
        self.norm_q, self.norm_k = nn.RMSNorm(head_dim), nn.RMSNorm(head_dim)
        self.linear_out = zero(nn.Linear(width, width))

    def forward(self, x, text, mask):
        B, N, C = x.shape
        q = self.q(self.norm(x)).view(B, N, -1, self.head_dim).transpose(1, 2)
        kv = self.kv(self.norm_text(text)).view(B, -1, 2, C // self.head_dim, self.head_dim)
        k, v = kv.permute(2, 0, 3, 1, 4)                        # (B, heads, L, head_dim) each
        q, k = self.norm_q(q.float()).to(v.dtype), self.norm_k(k.float()).to(v.dtype)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        return x + self.linear_out(h.transpose(1, 2).reshape(B, N, C))


class ByteEncoder(nn.Module):
    """A small transformer over bytes: see the module's docstring."""

    cross_attention = CrossAttentionBlock

    def __init__(self, length, width, depth=2):
        super().__init__()
        self.length, self.width = length, width
        self.token = nn.Embedding(257, width)           # row 0: the first of every sequence
        self.position = nn.Embedding(1 + length, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, max(1, width // 64), 4 * width, dropout=0,
                                       activation="gelu", batch_first=True, norm_first=True)
            for _ in range(depth))

    def forward(self, tokens, batch):
        tokens = F.pad(checked(tokens, batch, self.length, self.token.weight.device), (1, 0))
        mask = tokens > 0
        mask[:, 0] = True
        h = self.token(tokens) + self.position.weight
        for layer in self.layers:
            h = layer(h, src_key_padding_mask=~mask)
        return h, mask


class T5Encoder:
    """A frozen T5. Not an nn.Module: neither trained, nor copied, nor in a checkpoint.

    Raises ValueError, in one line, if there is no T5 of that name, or no `transformers`.
    """

    cross_attention = CrossAttentionBlock

    def __init__(self, name, length, download=True):
        self.length, self.last_tokens, self.last_output = length, None, None
        config = t5(name, "AutoConfig", download)
        if config.model_type != "t5":
            raise ValueError(f"t5:{name}: is no T5 but a {config.model_type}")
        with torch.device("cpu"):           # also where the network around it is made on "meta"
            self.encoder = t5(name, "T5EncoderModel", download).eval().requires_grad_(False)
        self.width, self.device = config.d_model, torch.device("cpu")
        self.encode = torch.compiler.disable(self.encode)

    def __deepcopy__(self, memo):
        return self

    def __call__(self, tokens, batch):
        if tokens is not None:
            self.device = tokens.device
        tokens = checked(tokens, batch, self.length, self.device)
        if tokens.is_meta:                  # memory.py asks for shapes only
            return tokens.new_empty(batch, 1 + self.length, self.width, dtype=torch.float32), \
                tokens.new_empty(batch, 1 + self.length, dtype=torch.bool)
        return self.encode(tokens)

    def encode(self, tokens):
        # A sampler asks for the same captions at each step, training never does.
        last = self.last_tokens
        if torch.is_grad_enabled() or last is None or not torch.equal(last, tokens):
            mask = tokens > 0                                   # T5, too, pads with 0
            h = self.encoder.to(tokens.device)(input_ids=tokens, attention_mask=mask)
            self.last_output = (F.pad(h.last_hidden_state.float(), (0, 0, 1, 0)),
                                F.pad(mask, (1, 0), value=True))
            self.last_tokens = tokens
        return self.last_output


LOADED = {}                                 # {(name, kind): object}, once for all who ask


def t5(name, kind, download):
    """The object `kind` of transformers for the model called `name`. Raises ValueError.

    download: whether it may come from the network; not for a name that was read from a file.
    """
    try:
        if (name, kind) not in LOADED:
            import transformers
            made = getattr(transformers, kind).from_pretrained(name, local_files_only=not download)
            LOADED[name, kind] = made
        return LOADED[name, kind]
    except ImportError as error:
        raise ValueError(f"t5:{name}: needs the package transformers ({error})")
    except Exception as error:              # a damaged folder raises any of many exceptions
        why = (str(error).splitlines() or [type(error).__name__])[0]
        if not download:
            why = f"it is not on this machine, or damaged; if you trust it, `hf download {name}` " \
                "brings it here"
        raise ValueError(f"t5:{name}: cannot be read ({why})")


def t5_tokens(caption, tokenizer, length):
    kept = tokenizer(caption, truncation=True, max_length=length).input_ids if caption else []
    return kept + [0] * (length - len(kept))


def tokenizer(kind, length, download=True):
    """ "bytes" or "t5:NAME" -> function: caption -> list of `length` numbers. Raises ValueError."""
    if kind == "bytes":
        return partial(byte_tokens, length=length)
    return partial(t5_tokens, tokenizer=t5(kind[3:], "AutoTokenizer", download), length=length)


def text_encoder(kind, length, width, download=True):
    """ "bytes" or "t5:NAME" -> its encoder, None for "". width: of the byte encoder."""
    if not kind:
        return None
    return ByteEncoder(length, width) if kind == "bytes" else T5Encoder(kind[3:], length, download)
