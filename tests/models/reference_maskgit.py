# SPDX-License-Identifier: Apache-2.0
"""The forward pass of FP-MaskGIT once more, written from the formulas and sharing no code with the library.

Everything runs in the dtype of the weights, one sequence and one head after the other. `weights` is a state dict (or
leaves of the same names that require gradients).
"""

import math
from types import SimpleNamespace

import torch

from .reference_mdlm import silu, solve


def rms_norm(x, eps, weight=1.0):
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight


def attention(x, qkv, config):
    """One sequence (L + R, D). The norm of queries and keys runs over the channels of all heads."""
    size = config.hidden_size // config.num_attention_heads
    query, key, value = (x @ qkv.T).split(config.num_attention_heads * size, dim=-1)
    query, key = rms_norm(query, config.rms_norm_eps), rms_norm(key, config.rms_norm_eps)
    outputs = []
    for head in range(config.num_attention_heads):
        q, k, v = (part[:, head * size : (head + 1) * size] for part in (query, key, value))
        shares = torch.exp(q @ k.T / math.sqrt(size))
        outputs.append(shares / shares.sum(dim=-1, keepdim=True) @ v)
    return torch.cat(outputs, dim=-1)


def block(h, c, weights, name, config):
    """Halton-MaskGIT's block on (B, L + R, D), with the class vectors c (B, D)."""
    w = {key.removeprefix(name): value for key, value in weights.items() if key.startswith(name)}
    vectors = c @ w["modulation.weight"].T + w["modulation.bias"]
    shift1, scale1, gate1, shift2, scale2, gate2 = vectors[:, None].split(config.hidden_size, dim=-1)
    x = rms_norm(h, config.rms_norm_eps, w["norm1.weight"]) * (1 + scale1) + shift1
    x = torch.stack([attention(row, w["attention.qkv_proj.weight"], config) for row in x])
    h = h + gate1 * (x @ w["attention.o_proj.weight"].T)
    x = rms_norm(h, config.rms_norm_eps, w["norm2.weight"]) * (1 + scale2) + shift2
    x = silu(x @ w["gate_proj.weight"].T) * (x @ w["up_proj.weight"].T)
    return h + gate2 * (x @ w["down_proj.weight"].T)


def reference_forward(
    config, weights, input_ids, class_labels=None, iterations=6, no_grad_iterations=0, previous_state=None,
    previous_share=1.0,
):  # fmt: skip
    """`logits` (B, L, V), `hidden` before the final norm, `state` h* (B, L + R, D) and the states h⁰, h¹, …, h*."""
    size, length = input_ids.shape
    labels = [config.num_classes] * size if class_labels is None else class_labels.tolist()
    c = silu(torch.stack([weights["class_embedding.weight"][label] for label in labels]))
    h = weights["embed_tokens.weight"][input_ids] + weights["position_embedding.weight"][None]
    h = torch.cat([h, torch.stack([weights["register_tokens.weight"]] * size)], dim=1)
    for i in range(config.num_pre_layers):
        h = block(h, c, weights, f"pre_layers.{i}.", config)
    states = []
    if config.num_fixed_point_layers:
        states = solve(
            h, config, weights, lambda h, name: block(h, c, weights, name, config), iterations, no_grad_iterations,
            previous_state, previous_share,
        )  # fmt: skip
        h = states[-1]
    for i in range(config.num_post_layers):
        h = block(h, c, weights, f"post_layers.{i}.", config)
    h = h[:, :length]
    shift, scale = (c @ weights["final_modulation.weight"].T + weights["final_modulation.bias"])[:, None].chunk(2, -1)
    normed = rms_norm(h, config.rms_norm_eps, weights["final_norm.weight"]) + weights["final_norm.bias"]
    head = weights["lm_head.weight"] if "lm_head.weight" in weights else weights["embed_tokens.weight"]
    logits = (normed * (1 + scale) + shift) @ head.T + weights["lm_head.bias"]
    return SimpleNamespace(logits=logits, hidden=h, state=states[-1] if states else None, states=states)
