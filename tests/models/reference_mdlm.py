# SPDX-License-Identifier: Apache-2.0
"""The forward pass of FP-MDLM once more, written from the formulas and sharing no code with the library.

Everything runs in the dtype of the weights: no fused kernels, no split injection, no solver, complex-number rotations.
`weights` is a state dict (or leaves of the same names that require gradients).
"""

import math
from types import SimpleNamespace

import torch


def layer_norm(x, weight, eps):
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight


def silu(x):
    return x / (1 + torch.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def turn(x, theta):
    """Channels k and k + K/2 of (L, K) are a complex number, turned by position · theta^(−2k/K)."""
    length, size = x.shape
    angles = torch.outer(
        torch.arange(length, dtype=x.dtype), theta ** (-2 * torch.arange(size // 2, dtype=x.dtype) / size)
    )
    turned = torch.complex(x[:, : size // 2], x[:, size // 2 :]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


def attention(x, real, qkv, config):
    """One sequence (L, D), one head after the other; keys where `real` is 0 get no weight."""
    outputs = []
    size = config.hidden_size // config.num_attention_heads
    query, key, value = (x @ qkv.T).split(config.hidden_size, dim=-1)
    for head in range(config.num_attention_heads):
        q, k, v = (part[:, head * size : (head + 1) * size] for part in (query, key, value))
        scores = turn(q, config.rope_theta) @ turn(k, config.rope_theta).T / math.sqrt(size)
        shares = torch.exp(scores - scores.max()) * real
        outputs.append(shares / shares.sum(dim=-1, keepdim=True) @ v)
    return torch.cat(outputs, dim=-1)


def block(h, c, real, weights, name, config):
    """MDLM's block on (B, L, D), with the conditioning vectors c (B, C)."""
    w = {key.removeprefix(name): value for key, value in weights.items() if key.startswith(name)}
    vectors = c @ w["modulation.weight"].T + w["modulation.bias"]
    shift1, scale1, gate1, shift2, scale2, gate2 = vectors[:, None].split(config.hidden_size, dim=-1)
    x = layer_norm(h, w["norm1.weight"], config.layer_norm_eps) * (1 + scale1) + shift1
    x = torch.stack(
        [attention(row, mask, w["attention.qkv_proj.weight"], config) for row, mask in zip(x, real, strict=True)]
    )
    h = h + gate1 * (x @ w["attention.o_proj.weight"].T)
    x = layer_norm(h, w["norm2.weight"], config.layer_norm_eps) * (1 + scale2) + shift2
    x = gelu(x @ w["up_proj.weight"].T + w["up_proj.bias"]) @ w["down_proj.weight"].T + w["down_proj.bias"]
    return h + gate2 * x


def inject(h, u, weights, kind):
    w = {key.removeprefix("fixed_point.injection."): value for key, value in weights.items()}
    if kind == "none":
        return h
    if kind == "diagonal":
        a = 1 / (1 + torch.exp(-w["decay_logit"]))
        return a * h + (1 - a) * u
    joint = torch.cat([w["state_proj.weight"], w["input_proj.weight"]], dim=1)  # of [h; u]
    z = torch.cat([h, u], dim=-1) @ joint.T + w["input_proj.bias"]
    return z if kind == "linear" else gelu(z) @ w["out_proj.weight"].T + w["out_proj.bias"]


def solve(h, config, weights, block, iterations, no_grad_iterations, previous_state, previous_share):
    """The states h⁰, h¹, …, h* behind P's output `h`; `block(h, name)` is one of F's."""
    looped = config.input_injection == "none"
    u = None if looped else h @ weights["fixed_point.input_proj.weight"].T + weights["fixed_point.input_proj.bias"]
    if previous_state is not None:
        h = previous_share * previous_state + (1 - previous_share) * h
    states = [h if looped else h.detach()]
    for iteration in range(no_grad_iterations + iterations):
        cut = iteration <= no_grad_iterations and not looped
        h = states[-1].detach() if cut else states[-1]  # SJFB: h cut, u live
        h = inject(h, u, weights, config.input_injection)
        for i in range(config.num_fixed_point_layers):
            h = block(h, f"fixed_point.layers.{i}.")
        states.append(h)
    return states


def conditioning(config, weights, timesteps, batch_size):
    """(B, C): SiLU of the σ-map of 128 cosines and 128 sines of σ; σ is 0 without time conditioning."""
    dtype = weights["lm_head.weight"].dtype
    sigma = torch.zeros(batch_size, dtype=dtype)
    if config.time_conditioning:
        sigma = -torch.log(1 - (1 - 1e-3) * timesteps.to(dtype))
    angles = torch.outer(sigma, torch.exp(-math.log(10000) * torch.arange(128, dtype=dtype) / 128))
    c = torch.cat([angles.cos(), angles.sin()], dim=-1)
    c = silu(c @ weights["time_embedding.mlp.0.weight"].T + weights["time_embedding.mlp.0.bias"])
    return silu(c @ weights["time_embedding.mlp.2.weight"].T + weights["time_embedding.mlp.2.bias"])


def reference_forward(
    config, weights, input_ids, timesteps=None, attention_mask=None,
    iterations=6, no_grad_iterations=0, previous_state=None, previous_share=1.0,
):  # fmt: skip
    """`logits` (B, L, V), `hidden` before the final norm, `state` h* and the list `states` h⁰, h¹, …, h*."""
    real = torch.ones(input_ids.shape) if attention_mask is None else attention_mask
    c = conditioning(config, weights, timesteps, len(input_ids))
    h = weights["embed_tokens.weight"][input_ids]
    for i in range(config.num_pre_layers):
        h = block(h, c, real, weights, f"pre_layers.{i}.", config)
    states = []
    if config.num_fixed_point_layers:
        states = solve(
            h, config, weights, lambda h, name: block(h, c, real, weights, name, config), iterations,
            no_grad_iterations, previous_state, previous_share,
        )  # fmt: skip
        h = states[-1]
    for i in range(config.num_post_layers):
        h = block(h, c, real, weights, f"post_layers.{i}.", config)
    shift, scale = (c @ weights["final_modulation.weight"].T + weights["final_modulation.bias"])[:, None].chunk(2, -1)
    normed = layer_norm(h, weights["final_norm.weight"], config.layer_norm_eps) * (1 + scale) + shift
    logits = normed @ weights["lm_head.weight"].T + weights["lm_head.bias"]
    return SimpleNamespace(logits=logits, hidden=h, state=states[-1] if states else None, states=states)
