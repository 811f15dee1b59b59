# SPDX-License-Identifier: Apache-2.0
"""Image tokenizers: files of LlamaGen and XQGAN give the codes and pixels of references written from the formulas,
under the originals' own parameter names."""

import argparse
import re

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import JanusVQVAE

from fpmgm.conversion import load_image_tokenizer, load_llamagen_vq, load_xqgan
from tests.testing_utils import refused


# --- LlamaGen, from the formulas -------------------------------------------------------------------------------------

BASE, WIDTHS, BLOCKS, LATENT, EMBED, CODES = 32, (32, 64, 64), 2, 16, 4, 24  # 16 pixels, 4 × 4 codes


class Drawn(dict):
    """A state dict that grows by random layers."""

    def __init__(self, seed: int):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def add(self, name, *shape, scale=0.1, shift=0.0):
        self[name] = shift + scale * torch.randn(*shape, generator=self.generator)

    def conv(self, name, inner, outer, size):
        self.add(f"{name}.weight", outer, inner, size, size, scale=(inner * size**2) ** -0.5)
        self.add(f"{name}.bias", outer)

    def norm(self, name, width):
        self.add(f"{name}.weight", width, shift=1)
        self.add(f"{name}.bias", width)

    def residual(self, name, inner, outer):
        self.norm(f"{name}.norm1", inner)
        self.conv(f"{name}.conv1", inner, outer, 3)
        self.norm(f"{name}.norm2", outer)
        self.conv(f"{name}.conv2", outer, outer, 3)
        if inner != outer:
            self.conv(f"{name}.nin_shortcut", inner, outer, 1)

    def attention(self, name, width):
        self.norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            self.conv(f"{name}.{part}", width, width, 1)


def llamagen_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under LlamaGen's names."""
    state, deepest = Drawn(seed), WIDTHS[-1]
    for half, first, last, widths, blocks, change, attending in (
        ("encoder", 3, LATENT, WIDTHS, BLOCKS, "downsample", len(WIDTHS) - 1),
        ("decoder", LATENT, 3, WIDTHS[::-1], BLOCKS + 1, "upsample", 0),
    ):
        width = BASE if half == "encoder" else deepest
        state.conv(f"{half}.conv_in", first, width, 3)
        for level, outer in enumerate(widths):
            name = f"{half}.conv_blocks.{level}"
            for block in range(blocks):
                state.residual(f"{name}.res.{block}", width, outer)
                width = outer
                if level == attending:
                    state.attention(f"{name}.attn.{block}", width)
            if level < len(widths) - 1:
                state.conv(f"{name}.{change}.conv", width, width, 3)
        state.residual(f"{half}.mid.0", deepest, deepest)
        state.attention(f"{half}.mid.1", deepest)
        state.residual(f"{half}.mid.2", deepest, deepest)
        state.norm(f"{half}.norm_out", width)
        state.conv(f"{half}.conv_out", width, last, 3)
    state.conv("quant_conv", LATENT, EMBED, 1)
    state.conv("post_quant_conv", EMBED, LATENT, 1)
    state.add("quantize.embedding.weight", CODES, EMBED, scale=3)
    state["quantize.codebook_used"] = torch.zeros(65536)
    return dict(state)


def llamagen(state: dict[str, torch.Tensor], x: torch.Tensor, half: str) -> torch.Tensor:
    """Encoder or decoder of LlamaGen's VQ."""

    def conv(name, x, **options):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)

    def norm(name, x):
        groups = x.reshape(len(x), 32, -1)
        scaled = (groups - groups.mean(-1, keepdim=True)) / (
            groups.var(-1, unbiased=False, keepdim=True) + 1e-6
        ).sqrt()
        weight, bias = (state[f"{name}.{part}"][:, None, None] for part in ("weight", "bias"))
        return scaled.view(x.shape) * weight + bias

    def residual(name, x):
        h = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", x)), padding=1)
        h = conv(f"{name}.conv2", F.silu(norm(f"{name}.norm2", h)), padding=1)
        return h + (conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in state else x)

    def attention(name, x):
        h = norm(f"{name}.norm", x)
        q, k, v = (conv(f"{name}.{part}", h).flatten(2) for part in "qkv")  # (B, C, N)
        weights = torch.einsum("bci,bcj->bij", q, k).div(q.shape[1] ** 0.5).softmax(-1)
        return x + conv(f"{name}.proj_out", torch.einsum("bij,bcj->bci", weights, v).view(x.shape))

    def middle(x):
        return residual(f"{half}.mid.2", attention(f"{half}.mid.1", residual(f"{half}.mid.0", x)))

    x = conv(f"{half}.conv_in", x, padding=1)
    x = middle(x) if half == "decoder" else x
    for level in range(len(WIDTHS)):
        name = f"{half}.conv_blocks.{level}"
        for block in range(BLOCKS + (half == "decoder")):
            x = residual(f"{name}.res.{block}", x)
            x = attention(f"{name}.attn.{block}", x) if f"{name}.attn.{block}.q.weight" in state else x
        if level < len(WIDTHS) - 1 and half == "encoder":
            x = conv(f"{name}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        elif level < len(WIDTHS) - 1:
            x = conv(f"{name}.upsample.conv", x.repeat_interleave(2, -1).repeat_interleave(2, -2), padding=1)
    x = middle(x) if half == "encoder" else x
    return conv(f"{half}.conv_out", F.silu(norm(f"{half}.norm_out", x)), padding=1)


def reference_codes(latents: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """(B, H, W) nearest rows on the unit sphere, of (B, E, H, W) latents."""
    z = F.normalize(latents.permute(0, 2, 3, 1), dim=-1)
    return torch.cdist(z.flatten(0, 2), F.normalize(codebook, dim=-1)).argmin(-1).view(z.shape[:3])


def looked_up(codes: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    return F.normalize(codebook, dim=-1)[codes].permute(0, 3, 1, 2)


@torch.no_grad()
def test_a_llamagen_file_gives_the_references_codes_and_pixels(tmp_path):
    state = llamagen_state()
    torch.save({"model": state}, tmp_path / "vq.pt")
    tokenizer = load_llamagen_vq(tmp_path / "vq.pt", image_size=16)
    assert (tokenizer.image_size, tokenizer.grid_size, tokenizer.codebook_size) == (16, 4, CODES)
    refused("`image_size`=18 must be a multiple of 4", load_llamagen_vq, tmp_path / "vq.pt", image_size=18)
    assert not tokenizer.training
    pixels = torch.rand(6, 3, 16, 16) * 2 - 1
    latents = F.conv2d(llamagen(state, pixels, "encoder"), state["quant_conv.weight"], state["quant_conv.bias"])
    expected = reference_codes(latents, state["quantize.embedding.weight"])
    codes = tokenizer.encode(pixels)
    assert torch.equal(codes, expected) and len(codes.unique()) > 8
    z = looked_up(codes, state["quantize.embedding.weight"])
    z = F.conv2d(z, state["post_quant_conv.weight"], state["post_quant_conv.bias"])
    expected = llamagen(state, z, "decoder")
    assert (expected.abs() > 1).any()  # clamping shows
    torch.testing.assert_close(tokenizer.decode(codes), expected.clamp(-1, 1), rtol=0, atol=2e-5)
    torch.testing.assert_close(tokenizer.decode(codes.flatten(1)), tokenizer.decode(codes), rtol=0, atol=0)


@torch.no_grad()
def test_a_folder_loads_here_and_as_a_model_of_transformers(tmp_path):
    save_file(llamagen_state(), tmp_path / "vq.safetensors")
    tokenizer = load_llamagen_vq(tmp_path / "vq.safetensors", image_size=16)
    tokenizer.save_pretrained(tmp_path / "pipeline/vq")
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    codes = tokenizer.encode(pixels)
    again = load_image_tokenizer(tmp_path / "pipeline", subfolder="vq")
    assert torch.equal(again.encode(pixels), codes)
    theirs = JanusVQVAE.from_pretrained(tmp_path / "pipeline/vq").eval()
    assert torch.equal(theirs.encode(pixels).image_tokens.view(codes.shape), codes)
    decoded = theirs.decode(codes.flatten(1)).clamp(-1, 1)
    torch.testing.assert_close(decoded, tokenizer.decode(codes), rtol=0, atol=1e-5)


# --- XQGAN, from the formulas ----------------------------------------------------------------------------------------

SIDE, PATCH, WIDTH, DEPTH, DIM = 4, 2, 128, 2, 8  # 8 pixels, 4 × 4 codes, two heads of 64


def xqgan_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under XQGAN's names, with what its training keeps beside them."""
    state, tokens = Drawn(seed), SIDE**2
    state.add("encoder.latent_tokens", 1, tokens, WIDTH, scale=0.3)
    state.add("encoder.model.patch_embed.proj.weight", WIDTH, 3, PATCH, PATCH, scale=1)
    state.add("encoder.model.patch_embed.proj.bias", WIDTH)
    state.add("decoder.mask_token", 1, 1, WIDTH, scale=1)
    state.add("decoder.to_pixel.model.weight", 3 * PATCH**2, WIDTH)
    state.add("decoder.to_pixel.model.bias", 3 * PATCH**2)
    state.conv("quant_conv", WIDTH, DIM, 1)
    state.conv("post_quant_conv", DIM, WIDTH, 1)
    state.add("quantize.embedding.weight", CODES, DIM, scale=3)
    state["quantize.ema_vocab_hit_SV"] = torch.zeros(CODES)
    state.add("semantic_model.blocks.0.attn.qkv.weight", 6, 2)
    state.add("sem_linear.weight", 2, 2)
    for half in ("encoder", "decoder"):
        model, latents = f"{half}.model", tokens + (half == "decoder")
        state.add(f"{half}.lvl_embed.weight", 2, WIDTH, scale=0.3)
        state[f"{half}.lvl1LC"] = torch.tensor([0] * (1 + tokens) + [1] * latents)[None]
        state.add(f"{model}.cls_token", 1, 1, WIDTH, scale=0.3)
        state.add(f"{model}.pos_embed", 1, 1 + tokens, WIDTH, scale=0.3)
        state.norm(f"{model}.norm", WIDTH)
        for layer in range(DEPTH):
            block = f"{model}.blocks.{layer}"
            for name, outer, inner in (
                ("attn.qkv", 3 * WIDTH, WIDTH),
                ("attn.proj", WIDTH, WIDTH),
                ("mlp.fc1", 4 * WIDTH, WIDTH),
                ("mlp.fc2", WIDTH, 4 * WIDTH),
            ):
                state.add(f"{block}.{name}.weight", outer, inner, scale=2 * inner**-0.5)
                state.add(f"{block}.{name}.bias", outer)
            for branch in "12":
                state.norm(f"{block}.norm{branch}", WIDTH)
                state.add(f"{block}.ls{branch}.gamma", WIDTH, scale=0.5)
    return dict(state)


def vision_transformer(state: dict[str, torch.Tensor], half: str, tokens: torch.Tensor) -> torch.Tensor:
    """Blocks and final norm on (B, L, D), heads of 64."""

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name, x):
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[f"{name}.weight"]
            + (state[f"{name}.bias"])
        )

    x = tokens
    for layer in range(DEPTH):
        block = f"{half}.model.blocks.{layer}"
        qkv = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x))
        heads = []
        for head in range(WIDTH // 64):
            q, k, v = (qkv[..., part * WIDTH + 64 * head :][..., :64] for part in range(3))
            heads.append((q @ k.mT / 8).softmax(-1) @ v)
        x = x + state[f"{block}.ls1.gamma"] * linear(f"{block}.attn.proj", torch.cat(heads, -1))
        hidden = linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x))
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
        x = x + state[f"{block}.ls2.gamma"] * linear(f"{block}.mlp.fc2", hidden)
    return norm(f"{half}.model.norm", x)


def with_class_token(state, half, tokens) -> torch.Tensor:
    cls = state[f"{half}.model.cls_token"].expand(len(tokens), -1, -1)
    return torch.cat([cls, tokens], dim=1) + state[f"{half}.model.pos_embed"]


def xqgan_latents(state: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    patches = F.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2)  # (B, N, 3·P²)
    patches = patches @ state["encoder.model.patch_embed.proj.weight"].flatten(1).T
    patches = patches + state["encoder.model.patch_embed.proj.bias"]
    latents = state["encoder.latent_tokens"] + state["encoder.model.pos_embed"][:, 1:]
    tokens = torch.cat([with_class_token(state, "encoder", patches), latents.expand(len(pixels), -1, -1)], dim=1)
    tokens = tokens + state["encoder.lvl_embed.weight"][state["encoder.lvl1LC"]]
    out = vision_transformer(state, "encoder", tokens)[:, -(SIDE**2) :]
    z = out @ state["quant_conv.weight"][:, :, 0, 0].T + state["quant_conv.bias"]
    return z.transpose(1, 2).view(len(pixels), DIM, SIDE, SIDE)


def xqgan_pixels(state: dict[str, torch.Tensor], quantised: torch.Tensor) -> torch.Tensor:
    z = quantised.flatten(2).transpose(1, 2) @ state["post_quant_conv.weight"][:, :, 0, 0].T
    z = with_class_token(state, "decoder", z + state["post_quant_conv.bias"])
    masks = with_class_token(state, "decoder", state["decoder.mask_token"].expand(len(z), SIDE**2, -1))
    tokens = torch.cat([masks, z], dim=1) + state["decoder.lvl_embed.weight"][state["decoder.lvl1LC"]]
    out = vision_transformer(state, "decoder", tokens)[:, 1 : 1 + SIDE**2]
    out = out @ state["decoder.to_pixel.model.weight"].T + state["decoder.to_pixel.model.bias"]
    image = torch.zeros(len(z), 3, SIDE * PATCH, SIDE * PATCH)
    for n in range(SIDE**2):
        row, column = divmod(n, SIDE)
        tile = out[:, n].view(-1, PATCH, PATCH, 3).permute(0, 3, 1, 2)
        image[..., row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] = tile
    return image


@torch.no_grad()
def test_an_xqgan_file_gives_the_references_codes_and_pixels(tmp_path):
    average, raw = xqgan_state(0), xqgan_state(1)
    # As the original's trainer writes it: options that pickle refuses to read as data, averaged weights beside others.
    options = argparse.Namespace(codebook_size=CODES, v_patch_nums=[SIDE], path=tmp_path)
    torch.save({"model": raw, "ema": average, "args": options, "steps": 3, "optimizer": {}}, tmp_path / "xqgan.pt")
    with pytest.raises(Exception, match="argparse"):
        torch.load(tmp_path / "xqgan.pt", weights_only=True)
    pixels = torch.rand(6, 3, 8, 8) * 2 - 1
    for state, tokenizer in (
        (average, load_xqgan(tmp_path / "xqgan.pt")),
        (average, load_image_tokenizer(tmp_path / "xqgan.pt")),
        (raw, load_xqgan(tmp_path / "xqgan.pt", use_ema=False)),
    ):
        assert (tokenizer.image_size, tokenizer.grid_size, tokenizer.codebook_size) == (8, SIDE, CODES)
        expected = reference_codes(xqgan_latents(state, pixels), state["quantize.embedding.weight"])
        codes = tokenizer.encode(pixels)
        assert torch.equal(codes, expected) and len(codes.unique()) > 6
        assert (codes[1:] != codes[:1]).any(dim=0).sum() > 6  # they depend on the image
        expected = xqgan_pixels(state, looked_up(codes, state["quantize.embedding.weight"]))
        assert (expected.abs() > 1).any()
        torch.testing.assert_close(tokenizer.decode(codes), expected.clamp(-1, 1), rtol=0, atol=2e-5)
    tokenizer.save_pretrained(tmp_path / "vq")
    again = load_image_tokenizer(tmp_path / "vq")
    assert torch.equal(again.encode(pixels), codes) and torch.equal(again.decode(codes), tokenizer.decode(codes))


# --- what does not fit -----------------------------------------------------------------------------------------------


def test_every_key_that_does_not_fit_is_listed(tmp_path):
    path = tmp_path / "xqgan.pt"
    state = xqgan_state()
    del state["decoder.model.blocks.1.attn.proj.bias"]
    state["encoder.something"] = torch.zeros(1)
    state["decoder.mask_token"] = torch.zeros(1, 1, 3)
    state["encoder.model.norm.weight"][0] = float("inf")
    torch.save({"model": state}, path)
    message = refused("do not fit", load_xqgan, path)
    for problem, name in {
        "missing": "decoder.transformer.layers.1.o_proj.bias",
        "unknown": "encoder.something",
        "wrong shape": "decoder.mask_token",
        "not finite": "encoder.transformer.norm.weight",
    }.items():
        assert re.findall(rf"^  {problem}: (\S+)", message, flags=re.MULTILINE) == [name]


def test_files_and_folders_of_something_else_are_refused(tmp_path):
    path = tmp_path / "other.pt"
    torch.save({"model": {"quantizes.0.embedding.weight": torch.zeros(2, 2)}}, path)
    refused("product quantisation", load_xqgan, path)
    torch.save({"model": {"weight": torch.zeros(2)}}, path)
    refused("not a VQ model of LlamaGen", load_image_tokenizer, path)
    torch.save([1, 2], path)
    refused("no state dict", load_image_tokenizer, path)
    refused("does not exist", load_image_tokenizer, tmp_path / "gone.pt")
    for name in (tmp_path / "gone", "./gone", "/gone/vq"):
        refused(r"`path_or_repo`='.*gone.*' does not exist", load_image_tokenizer, name)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    refused(r"'bert'.*known are", load_image_tokenizer, tmp_path)


def test_pixels_and_codes_out_of_range_are_refused(tmp_path):
    torch.save(xqgan_state(), tmp_path / "xqgan.pt")
    tokenizer = load_xqgan(tmp_path / "xqgan.pt")
    refused(r"from 0 to 255.*\[-1, 1\]", tokenizer.encode, torch.full((1, 3, 8, 8), 255.0).tril())
    refused(r"\(1, 3, 9, 8\)", tokenizer.encode, torch.zeros(1, 3, 9, 8))
    refused("4 × 4 codes", tokenizer.decode, torch.zeros(1, 15, dtype=torch.long))
    refused(f"to {CODES}.*masked positions", tokenizer.decode, torch.full((1, 16), CODES))


# --- gradients -------------------------------------------------------------------------------------------------------


def test_training_moves_codes_to_latents_and_passes_the_decoders_gradient_straight_through(tmp_path):
    torch.save(llamagen_state(), tmp_path / "vq.pt")
    tokenizer = load_llamagen_vq(tmp_path / "vq.pt", image_size=16)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    out = tokenizer(pixels)
    torch.testing.assert_close(out.pixel_values.clamp(-1, 1), tokenizer.decode(out.codes), rtol=0, atol=2e-5)
    out.latents.retain_grad()
    out.loss.backward()
    # The decoder alone, at the quantised latents, gives the gradient that the latents must receive.
    quantised = F.normalize(tokenizer.codebook, dim=-1)[out.codes].detach().requires_grad_()
    loss = (tokenizer.pixels(quantised) - pixels).abs().mean()
    (through,) = torch.autograd.grad(loss, quantised)
    pull = 0.25 * 2 * (out.latents - quantised).detach() / quantised.numel()
    torch.testing.assert_close(out.latents.grad, through + pull, rtol=1e-4, atol=1e-7)
    used, grad = out.codes.unique(), tokenizer.codebook.grad
    assert (grad[used].norm(dim=-1) > 0).all() and grad.norm(dim=-1).count_nonzero() == len(used)
    total = (out.latents.detach() - quantised).square().mean() * 1.25 + loss
    torch.testing.assert_close(out.loss, total)
