"""What a network is told of a picture: its class, which way is up, its caption (Section 3.6).

All of it is one row of whole numbers, `condition`: (2 + L,). A caption is L of them, its tokens; 0
is nothing, and fills the row's end. The empty caption, all 0, is also what a dropped one becomes.
An encoder makes a sequence of it, which the transformer reads by cross-attention, and whose mean
joins the clock (uvit.py: Embedding):

    tokens (B, L) -> embeddings (B, 1 + L, T), seen (B, 1 + L) bool

The first is there whatever the caption says, so that there is always one to attend to; the others
are seen where the token is not 0. Two encoders:

    bytes       not in the paper: a small transformer over UTF-8, part of the network and trained
    t5:NAME     the paper's: a frozen T5, a folder or a name `transformers` knows (to be installed)
"""
from functools import cache, partial

import torch
import torch.nn as nn


def condition(label, upright, tokens=()):
    """A class, whether the picture stood upright and was turned, tokens (L,) -> (2 + L,) int64."""
    return torch.tensor([label, upright, *tokens])


def unconditional(label, classes):
    """The condition that says nothing but which way is up, for guidance: (B,) classes or
    (B, 2 + L) rows -> the same shape. `classes` is the null class, no token the empty caption.
    """
    rows = label.view(len(label), -1)
    return torch.cat([torch.full_like(rows[:, :1], classes), rows[:, 1:2],
                      torch.zeros_like(rows[:, 2:])], 1).view_as(label)


def byte_tokens(caption, length):
    """Caption -> list of length: its UTF-8 bytes, each plus 1, cut or filled up with 0."""
    codes = [byte + 1 for byte in caption.encode("utf-8", "replace")[:length]]
    return codes + [0] * (length - len(codes))


class ByteEncoder(nn.Module):
    """A transformer over bytes: see the module's docstring."""

    def __init__(self, length, width, depth=2):
        super().__init__()
        self.length, self.width = length, width
        self.token = nn.Embedding(257, width)           # row 0: the first of every sequence
        self.position = nn.Embedding(1 + length, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, max(1, width // 64), 4 * width, dropout=0,
                                       activation="gelu", batch_first=True, norm_first=True)
            for _ in range(depth))

    def forward(self, tokens):
        tokens = nn.functional.pad(tokens, (1, 0))
        seen = tokens > 0
        seen[:, 0] = True
        h = self.token(tokens) + self.position.weight
        for layer in self.layers:
            h = layer(h, src_key_padding_mask=~seen)
        return h, seen


class T5Encoder:
    """A frozen T5. No Module: neither trained, nor copied, nor in a checkpoint.

    Raises ValueError, one line, if there is no T5 of that name, or no `transformers`.
    """

    def __init__(self, name, length):
        self.length, self.last = length, (None, None)
        config = t5(name, "AutoConfig")
        if config.model_type != "t5":
            raise ValueError(f"t5:{name}: is no T5 but a {config.model_type}")
        with torch.device("cpu"):           # whatever the network around it is made on
            self.encoder = t5(name, "T5EncoderModel").eval().requires_grad_(False)
        self.width = config.d_model
        self.encode = torch.compiler.disable(self.encode)       # here: its import takes a second

    def __deepcopy__(self, memo):
        return self

    def __call__(self, tokens):
        if tokens.is_meta:                  # only shapes are asked for (memory.py)
            shape = len(tokens), 1 + self.length
            return tokens.new_empty(*shape, self.width, dtype=torch.float32), \
                tokens.new_empty(shape, dtype=torch.bool)
        return self.encode(tokens)

    def encode(self, tokens):
        said, sequence = self.last          # a sampler says it at each step, training never again
        if torch.is_grad_enabled() or said is None or not torch.equal(said, tokens):
            seen = tokens > 0                                   # T5, too, fills up with 0
            h = self.encoder.to(tokens.device)(input_ids=tokens, attention_mask=seen)
            sequence = (nn.functional.pad(h.last_hidden_state.float(), (0, 0, 1, 0)),
                        nn.functional.pad(seen, (1, 0), value=True))
            self.last = tokens, sequence
        return sequence


@cache
def t5(name, kind):
    try:
        import transformers
        return getattr(transformers, kind).from_pretrained(name)
    except ImportError as error:
        raise ValueError(f"t5:{name}: needs the package transformers ({error})")
    except Exception as error:              # whatever a missing or a damaged folder brings up
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"t5:{name}: cannot be read ({why})")


def t5_tokens(caption, tokenizer, length):
    kept = tokenizer(caption, truncation=True, max_length=length).input_ids if caption else []
    return kept + [0] * (length - len(kept))


def tokenizer(kind, length):
    """ "bytes" or "t5:NAME" -> function: caption -> list of `length` numbers. Raises ValueError."""
    if kind == "bytes":
        return partial(byte_tokens, length=length)
    return partial(t5_tokens, tokenizer=t5(kind[3:], "AutoTokenizer"), length=length)


def text_encoder(kind, length, width):
    """ "bytes" or "t5:NAME" -> the encoder, None for "" (width: of the byte encoder)."""
    if not kind:
        return None
    return ByteEncoder(length, width) if kind == "bytes" else T5Encoder(kind[3:], length)
