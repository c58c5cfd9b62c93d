"""A TopK model written out in plain torch, one text at a time, with what steers it in its place.

Nothing of the project is used but the weights' names: this is what the steered models are
compared with.
"""

import math

import torch


def topk(x, k):
    """[S, D]: relu of the k largest of each row and of what ties with them."""
    least = x.sort(dim=-1, descending=True).values[:, min(k, x.shape[-1]) - 1 :][:, :1]
    return torch.where(x >= least, x.clamp(min=0), 0.0)


def norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def rotated(x, theta):
    """[S, H, E]: pairs (2j, 2j + 1) as complex numbers, turned by position * theta^(-2j / E)."""
    length, _, width = x.shape
    # The tables of all implementations are in float32.
    frequencies = 1.0 / theta ** (torch.arange(0, width, 2).float() / width)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    turns = torch.complex(angles.cos().double(), angles.sin().double())[:, None]
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns).flatten(-2)


def attention(x, w, n_heads, theta):
    q, k, v = (
        (x @ w[f"attention.{name}.weight"].T).unflatten(-1, (n_heads, -1))
        for name in ("wq", "wk", "wv")
    )
    scores = torch.einsum("she,the->hst", rotated(q, theta), rotated(k, theta))
    scores = scores / math.sqrt(q.shape[-1]) + torch.full_like(scores, -torch.inf).triu(1)
    seen = torch.einsum("hst,the->she", scores.softmax(-1), v)
    return seen.flatten(-2) @ w["attention.wo.weight"].T


def plain_logits(weights, tokens, args, before=None, after=None):
    """Logits [S, V] of one text, [S] ids.

    args: n_layers, n_heads, theta, eps, k, topk_layers, site of the model. before, after:
    functions of (layer, x [S, D]) that give what TopK selects from, and what it gave, anew.
    """
    before = before or (lambda layer, x: x)
    after = after or (lambda layer, y: y)
    h = weights["tok_embeddings.weight"][tokens]
    for layer in range(args["n_layers"]):
        prefix = f"layers.{layer}."
        w = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        here = args["site"] if layer in args["topk_layers"] else ""
        x = norm(h, w["attention_norm.weight"], args["eps"])
        h = h + attention(x, w, args["n_heads"], args["theta"])
        x = norm(h, w["ffn_norm.weight"], args["eps"])
        gate = x @ w["feed_forward.w1.weight"].T
        if here == "mlp":
            gate = after(layer, topk(before(layer, gate), args["k"]))
        else:
            gate = gate * gate.sigmoid()
        h = h + (gate * (x @ w["feed_forward.w3.weight"].T)) @ w["feed_forward.w2.weight"].T
        if here == "residual":
            h = after(layer, topk(before(layer, h), args["k"]))
    return norm(h, weights["norm.weight"], args["eps"]) @ weights["output.weight"].T


def plain_greedy(weights, prompt, tokens, banned, args, before=None, after=None):
    """What is likeliest behind a prompt and each further one of its tokens: ids, as many.

    They are `tokens` if and only if greedy search writes those: the first is its first one, and
    what is likeliest behind that and all before it is its next.
    """
    logits = plain_logits(weights, torch.tensor([*prompt, *tokens[:-1]]), args, before, after)
    logits[:, banned] = -torch.inf
    return logits[len(prompt) - 1 :].argmax(-1).tolist()
