"""The fused decoder is diffusers' function: with and without attention, shortcuts, tiles."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from chromarpc_server.pipeline.fused import decoder as fused_decoder
from chromarpc_server.pipeline.fused import plain
from chromarpc_server.pipeline.fused.decoder import FusedDecoder, fuse, with_fused_decoder
from chromarpc_server.pipeline.libraries import libraries
from chromarpc_server.pipeline.models import autoencoder
from chromarpc_server.pipeline.models.autoencoder import build_autoencoder
from chromarpc_server.pipeline.weights.reading import read_json
from tests.tiny_checkpoint import GOLDENS

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
MINI_VAE = GOLDENS.parents[1] / "server" / "chromarpc_server" / "assets" / "chroma_mini" / "vae"
SMALL = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [8, 16, 24],
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 4,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.36,
    "shift_factor": 0.11,
}


def _small(**changes: object) -> object:
    torch.manual_seed(5)
    return libraries().autoencoder.from_config({**SMALL, **changes}).eval()


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(1, 16, 6, 10, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("attends", [True, False])
@torch.inference_mode()
def test_it_is_diffusers_function(latents: torch.Tensor, attends: bool) -> None:
    model = _small(mid_block_add_attention=attends)
    for parameter in model.parameters():  # norms and biases that are not ones and zeros
        parameter.add_(0.1 * torch.randn_like(parameter))
    expected = model.decode(latents, return_dict=False)[0]
    found = fuse(model).decode(latents, return_dict=False)[0]
    assert found.shape == expected.shape
    assert _relative(found, expected) < 2e-6


@torch.inference_mode()
def test_in_bf16_it_is_as_close_to_the_truth(latents: torch.Tensor) -> None:
    weights = load_file(MINI_VAE / "diffusion_pytorch_model.safetensors")
    config = read_json(MINI_VAE / "config.json")
    wide = build_autoencoder(config, weights, device=CPU, dtype=torch.float32)
    narrow = build_autoencoder(config, weights, device=CPU, dtype=torch.bfloat16)
    truth = autoencoder.decode(wide, latents)
    fused = _relative(autoencoder.decode(fuse(narrow), latents), truth)
    assert fused <= 1.1 * _relative(autoencoder.decode(narrow, latents), truth)


@torch.inference_mode()
def test_what_goes_in_and_comes_out_is_rounded_where_one_asks_for_it(latents: torch.Tensor) -> None:
    model = _small()
    wide, rounded = autoencoder.decode(model, latents), autoencoder.decode(model, latents, torch.bfloat16)
    assert wide.dtype == torch.float32
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, autoencoder.decode(model, latents.bfloat16(), torch.bfloat16))
    assert float((rounded.float() - wide).abs().max()) < 0.05


@torch.inference_mode()
def test_tiles_go_through_it_too(latents: torch.Tensor) -> None:
    model = _small()
    model.tile_latent_min_size, model.tile_sample_min_size = 4, 16
    model.enable_tiling()
    assert _relative(fuse(model).decode(latents)[0], model.decode(latents)[0]) < 2e-6


def test_it_shares_the_weights_and_leaves_the_original_alone() -> None:
    model = _small()
    fused = fuse(model)
    assert isinstance(fused.decoder, FusedDecoder)
    assert not isinstance(model.decoder, FusedDecoder)
    assert {p.data_ptr() for p in fused.parameters()} == {p.data_ptr() for p in model.parameters()}


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands in for those of a GPU."""
    ops = SimpleNamespace(**vars(plain))
    monkeypatch.setattr(fused_decoder, "fused_ops", lambda _: ops)
    return ops


def test_on_a_cpu_diffusers_own_is_used() -> None:
    model = _small()
    assert with_fused_decoder(model) is model


def test_where_kernels_run_and_are_right_it_is_used(kernels: SimpleNamespace) -> None:
    assert isinstance(with_fused_decoder(_small()).decoder, FusedDecoder)


def test_a_wrong_kernel_is_noticed(kernels: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    kernels.add_residual = lambda x, y, bias: plain.add_residual(x, y, bias) * 1.2
    model = _small()
    assert with_fused_decoder(model) is model
    assert [record.message for record in caplog.records] == ["decoder.wrong"]


def test_another_kind_of_decoder_is_left_to_diffusers(
    kernels: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    model = _small()
    model.decoder = torch.nn.Identity()
    assert with_fused_decoder(model) is model
    assert [record.message for record in caplog.records] == ["decoder.unusable"]
