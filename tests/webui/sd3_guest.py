"""An extension beside ours in the tests' web UI: SD 3's text encoders are small, and its classes can be tried alone."""

import json
import threading
from pathlib import Path

import torch
from modules import script_callbacks, shared
from modules.models.sd3 import mmdit, other_impls, sd3_cond
from transformers import CLIPTokenizer

FOLDER = Path(__file__).parents[1]
SMALL = json.loads((FOLDER / "text_encoder.json").read_text(encoding="utf-8"))


class Tokenizer:
    """CLIP's, from this folder; in place of T5's as well, which is asked for even where T5 is off."""

    @staticmethod
    def from_pretrained(name):
        return CLIPTokenizer.from_pretrained(FOLDER / "tokenizer")


sd3_cond.CLIPL_CONFIG.update(SMALL)
sd3_cond.CLIPG_CONFIG.update(SMALL)
for module in (sd3_cond, other_impls):
    module.CLIPTokenizer = module.T5TokenizerFast = Tokenizer


def transformer():
    """Two blocks of four heads, 64 wide."""
    context = {"target": "torch.nn.Linear", "params": {"in_features": 96, "out_features": 256}}
    model = mmdit.MMDiT(
        input_size=None, pos_embed_max_size=24, patch_size=2, in_channels=16, depth=4, num_patches=24**2,
        adm_in_channels=32, context_embedder_config=context,
    )  # fmt: skip
    text, pooled = torch.randn(2, 154, 96), torch.randn(2, 32)
    return model, lambda cast: model(
        cast(torch.randn(2, 16, 32, 24)), torch.tensor([500.0, 20.0]), context=cast(text), y=cast(pooled)
    )


def block():
    """What nothing calls today: attention of one kind of token."""
    layer = mmdit.DismantledBlock(128, 2, attn_mode="torch", qkv_bias=True)
    return layer, lambda cast: layer(cast(torch.randn(2, 70, 128)), cast(torch.randn(2, 128)))


def vae_layer():
    from modules.models.sd3 import sd3_impls

    layer = sd3_impls.AttnBlock(512)
    return layer, lambda cast: layer(cast(torch.randn(1, 512, 24, 16)))


def vae():
    """There and back."""
    from modules.models.sd3 import sd3_impls

    encoder, decoder = sd3_impls.VAEEncoder(ch=32), sd3_impls.VAEDecoder(ch=32)
    layers = torch.nn.ModuleList([encoder, decoder])
    return layers, lambda cast: decoder(encoder(cast(torch.randn(1, 3, 64, 96)))[:, :16])


def clip():
    model = other_impls.CLIPTextModel({**sd3_cond.CLIPL_CONFIG}, torch.float32, "cpu")
    return model, lambda cast: model(torch.randint(0, 49408, (1, 77)))[0]


def t5():
    config = {"num_layers": 2, "d_model": 64, "d_ff": 128, "num_heads": 4, "vocab_size": 100}
    model = other_impls.T5(config, torch.float32, "cpu")
    return model, lambda cast: model(torch.randint(0, 100, (1, 77)))[0]


PARTS = {make.__name__: make for make in (transformer, block, vae_layer, vae, clip, t5)}
lock = threading.Lock()  # of the random numbers


@torch.no_grad()
def output(part: str, dtype: str = "float32") -> dict:
    """What a part of SD 3 makes with random weights and inputs, the same each time."""
    dtype = getattr(torch, dtype)
    with lock, torch.random.fork_rng():
        torch.manual_seed(0)
        model, call = PARTS[part]()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.5 * parameter[0].numel() ** -0.5)
        model.to(dtype)
        made = call(lambda tensor: tensor.to(dtype))
    return {"dtype": str(made.dtype), "numbers": made.float().flatten().tolist()}


def names() -> dict:
    """Which object stands at each name that attention goes through, and whose code it is."""
    from modules.models.sd3 import sd3_impls

    held = {
        "other_impls.attention": other_impls.attention,
        "mmdit.attention": mmdit.attention,
        "sd3_impls.AttnBlock.forward": sd3_impls.AttnBlock.forward,
    }
    return {name: [id(it), it.__module__] for name, it in held.items()}


def reload() -> None:
    """As the button "Reload UI" does; only with a page."""
    shared.state.request_restart()


def mount(_page, app):
    app.add_api_route("/sd3/output", output, methods=["GET"])
    app.add_api_route("/sd3/names", names, methods=["GET"])
    app.add_api_route("/sd3/reload", reload, methods=["GET"])


script_callbacks.on_app_started(mount)
