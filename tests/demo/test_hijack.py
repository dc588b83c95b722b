"""Which attention entry is in force, and what it does to ldm's classes."""

import pytest
import torch
from ldm.modules.attention import CrossAttention
from ldm.modules.diffusionmodules.model import AttnBlock

ENTRIES = """
from modules import script_callbacks, sd_hijack_optimizations as optimizations

class Entry(optimizations.SdOptimization):
    def __init__(self, name, priority, cmd_opt=None, available=True):
        self.name, self.priority, self.cmd_opt, self.available = name, priority, cmd_opt, available
    def is_available(self): return self.available

script_callbacks.on_list_optimizers(lambda found: found.extend([
    Entry("low", 10, "opt_sub_quad_attention"), Entry("high", 99), Entry("absent", 1000, available=False)]))
"""


@pytest.fixture
def hijack(extension, host):
    from modules import sd_hijack

    extension(ENTRIES)
    host.load_extension()
    return sd_hijack


def test_order_and_titles(hijack):
    from modules.shared_items import cross_attention_optimizations

    assert [entry.name for entry in hijack.optimizers] == ["high", "sdp", "low"]
    assert cross_attention_optimizations() == ["Automatic", "high", "sdp - scaled dot product", "low", "None"]


def test_selection(hijack, monkeypatch):
    from modules.shared_cmd_options import cmd_opts

    assert hijack.apply_optimizations("Automatic") == "high"
    assert hijack.apply_optimizations("low") == "low"
    assert hijack.apply_optimizations("gone") == "high"
    assert hijack.apply_optimizations("None") == "" and hijack.current_optimizer is None
    monkeypatch.setattr(cmd_opts, "opt_sub_quad_attention", True)
    assert hijack.apply_optimizations() == "low"
    monkeypatch.setattr(cmd_opts, "disable_opt_split_attention", True)
    assert hijack.apply_optimizations() == ""


def test_an_entry_is_found_by_name_or_title(hijack, host):
    from lib_subquad.console import UserError

    assert host.title_of("SDP") == host.title_of("sdp - scaled dot product") == "sdp - scaled dot product"
    with pytest.raises(UserError, match="expected one of Automatic, high"):
        host.title_of("fastest")


def test_undo_gives_the_classes_their_own_forwards_back(hijack):
    own = CrossAttention.forward, AttnBlock.forward
    hijack.apply_optimizations("sdp - scaled dot product")
    assert CrossAttention.forward is not own[0] and AttnBlock.forward is not own[1]
    hijack.apply_optimizations("None")
    assert (CrossAttention.forward, AttnBlock.forward) == own


@pytest.mark.parametrize("context_tokens", [None, 7])
@pytest.mark.parametrize("masked", [False, True])
def test_sdp_is_ldms_cross_attention(hijack, context_tokens, masked):
    torch.manual_seed(0)
    layer = CrossAttention(32, None if context_tokens is None else 24, heads=4, dim_head=8)
    x = torch.randn(2, 9, 32)
    context = None if context_tokens is None else torch.randn(2, context_tokens, 24)
    mask = torch.rand(2, context_tokens or 9) < 0.7 if masked else None
    expected = layer(x, context=context, mask=mask)
    hijack.apply_optimizations("sdp - scaled dot product")
    torch.testing.assert_close(layer(x, context=context, mask=mask), expected, atol=1e-5, rtol=1e-5)


def test_sdp_is_ldms_attn_block(hijack):
    torch.manual_seed(0)
    layer, x = AttnBlock(64), torch.randn(2, 64, 4, 6)
    expected = layer(x)
    hijack.apply_optimizations("sdp - scaled dot product")
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_hypernetworks(host):
    from modules.hypernetworks.hypernetwork import apply_hypernetworks

    class Network:
        layers = {4: (lambda t: t + 1, lambda t: t * 2)}

    keys, values = apply_hypernetworks([Network(), Network()], torch.ones(1, 2, 4))
    assert keys.eq(3).all() and values.eq(4).all()
    context = torch.ones(1, 2, 5)
    assert apply_hypernetworks([Network()], context) == (context, context)
