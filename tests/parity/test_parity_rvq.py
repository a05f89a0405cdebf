"""Against vector-quantize-pytorch, the library of the study, every argument set."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import Tensor

from reproduce.model import rvq
from reproduce.model.codebook import kmeans
from reproduce.model.rvq import ResidualQuantizers, RvqOptions

library = pytest.importorskip("vector_quantize_pytorch")
D, V, L = 48, 32, 4


SETTINGS = {
    # of ResidualVQ
    "dim": D,
    "num_quantizers": L,
    "codebook_size": V,
    "codebook_dim": D,
    "shared_codebook": False,
    "diveq": False,
    "quantize_dropout": False,
    "quantize_dropout_cutoff_index": 0,
    "quantize_dropout_multiple_of": 1,
    "implicit_neural_codebook": False,
    "mlp_kwargs": {},
    "beam_size": None,
    "eval_beam_size": None,
    "beam_score_quantizer_weights": None,
    "quant_grad_frac": 0.0,
    # of its VectorQuantize layers
    "heads": 1,
    "separate_codebook_per_head": False,
    "accept_image_fmap": False,
    "accept_3d_fmap": False,
    "channel_last": True,
    "layernorm_after_project_in": False,
    "decay": 0.99,
    "eps": 1e-5,
    "freeze_codebook": False,
    "kmeans_init": False,
    "kmeans_iters": 10,
    "sync_kmeans": False,
    "use_cosine_sim": False,
    "threshold_ema_dead_code": 0,
    "commitment_weight": 1.0,
    "commitment_use_cross_entropy_loss": False,
    "orthogonal_reg_weight": 0.0,
    "orthogonal_reg_active_codes_only": False,
    "orthogonal_reg_max_codes": None,
    "codebook_diversity_loss_weight": 0.0,
    "codebook_diversity_temperature": 100.0,
    "stochastic_sample_codes": False,
    "sample_codebook_temp": 1.0,
    "straight_through": False,
    "rotation_trick": False,
    "directional_reparam": False,
    "directional_reparam_variance": 0.005,
    "sync_codebook": False,
    "sync_affine_param": False,
    "ema_update": True,
    "vq_bridge": None,
    "manual_ema_update": False,
    "learnable_codebook": False,
    "in_place_codebook_optimizer": None,
    "manual_in_place_optimizer_update": False,
    "affine_param": False,
    "affine_param_batch_decay": 0.99,
    "affine_param_codebook_decay": 0.9,
    "sync_update_v": 0.0,
    "return_zeros_for_masked_padding": True,
    "route_gradients_to_input": True,
}
"""Every argument of the library's versions from 1.23 on: nothing is left to its defaults."""


def arguments() -> set[str]:
    """What the installed version takes."""
    kinds = (library.ResidualVQ, library.VectorQuantize)
    names = {name for kind in kinds for name in inspect.signature(kind).parameters}
    return names - {"vq_kwargs"}


def test_no_argument_of_the_library_is_left_to_its_default() -> None:
    """Those of a version to come are to be looked at, and set."""
    assert arguments() - SETTINGS.keys() == set()


def oracle(
    *,
    dim: int = D,
    codes: int = V,
    levels: int = L,
    decay: float = 0.99,
    kmeans_init: bool = False,
    threshold: float = 0,
) -> torch.nn.Module:
    """ResidualVQ as the study had it, with every argument set that this version of it takes."""
    wanted = SETTINGS | {
        "dim": dim,
        "num_quantizers": levels,
        "codebook_size": codes,
        "codebook_dim": dim,
        "decay": decay,
        "kmeans_init": kmeans_init,
        "threshold_ema_dead_code": threshold,
    }
    known = arguments()
    module: torch.nn.Module = library.ResidualVQ(
        **{name: value for name, value in wanted.items() if name in known}
    )
    return module


def books(module: torch.nn.Module) -> Tensor:
    return torch.stack([layer._codebook.embed[0] for layer in module.layers])  # type: ignore


def sizes(module: torch.nn.Module) -> Tensor:
    return torch.stack([layer._codebook.cluster_size[0] for layer in module.layers])  # type: ignore


def copy_to(module: torch.nn.Module, ours: ResidualQuantizers) -> None:
    """Give the library's codebooks to ours."""
    state = ours.arm_state(0)
    layers = [layer._codebook for layer in module.layers]  # type: ignore
    state["codebooks"] = torch.stack([layer.embed[0] for layer in layers])
    state["vector_sum"] = torch.stack([layer.embed_avg[0] for layer in layers])
    state["cluster_size"] = torch.stack([layer.cluster_size[0] for layer in layers])
    ours.load_arm_state(0, state)


def spread(module: torch.nn.Module, scale: float) -> torch.nn.Module:
    """Codes of the features' own size, and of falling size over the levels."""
    with torch.no_grad():
        for level, layer in enumerate(module.layers):  # type: ignore
            for name in ("embed", "embed_avg"):
                getattr(layer._codebook, name).normal_(std=scale * 0.7**level)
    return module


def features(seed: int, shape: tuple[int, ...] = (3, 40, D)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ours_for(module: torch.nn.Module, **options: object) -> ResidualQuantizers:
    settings = RvqOptions(**{"codes": V} | options)  # type: ignore[arg-type]
    quantizers = ResidualQuantizers([L], D, seeds=[0], options=settings)
    copy_to(module, quantizers)
    return quantizers


def test_the_librarys_defaults_are_what_as_run_says() -> None:
    """Only dim, codes, levels and decay set, as in the study: no revival, Kaiming-uniform codes."""
    torch.manual_seed(0)
    bare = library.ResidualVQ(dim=768, codebook_size=256, num_quantizers=2, decay=0.99)
    codebook = bare.layers[0]._codebook
    assert codebook.threshold_ema_dead_code == 0
    assert (codebook.decay, codebook.eps) == (0.99, 1e-5)
    assert bool(codebook.initted)
    assert codebook.cluster_size.eq(1).all()
    assert torch.equal(codebook.embed_avg, codebook.embed)
    bound = math.sqrt(6 / (256 * 768))
    options = RvqOptions(codes=256)
    ours = ResidualQuantizers([2], 768, seeds=[0], options=options).arm_state(0)["codebooks"]
    for tensor in (codebook.embed, ours):
        assert tensor.abs().max().item() == pytest.approx(bound, rel=1e-4)
        assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=5e-3)


def test_same_codebooks_give_the_same_codes_and_output() -> None:
    torch.manual_seed(0)
    module = spread(oracle(), 0.7).eval()
    quantizers = ours_for(module).eval()
    x = features(0)
    theirs, codes, _ = module(x)
    out = quantizers(x)
    assert torch.equal(out.codes[0], codes)
    torch.testing.assert_close(out.quantized[0], theirs)


def test_same_update_and_commitment_after_one_step() -> None:
    torch.manual_seed(0)
    module = spread(oracle(decay=0.8), 0.7).train()
    quantizers = ours_for(module, decay=0.8).train()
    x = features(1)
    _, codes, commitment = module(x)
    out = quantizers(x)
    assert torch.equal(out.codes[0], codes)
    torch.testing.assert_close(out.commitment[0] / out.frames, commitment.sum())
    torch.testing.assert_close(quantizers.arm_state(0)["codebooks"], books(module))
    torch.testing.assert_close(quantizers.arm_state(0)["cluster_size"], sizes(module))


def test_padding_left_out_as_by_the_librarys_mask() -> None:
    torch.manual_seed(0)
    module = spread(oracle(), 0.7).train()
    quantizers = ours_for(module, padding=False).train()
    lengths = torch.tensor([40, 7, 23])
    mask = torch.arange(40) < lengths.unsqueeze(-1)
    theirs, codes, commitment = module(features(2), mask=mask)
    out = quantizers(features(2), lengths)
    assert torch.equal(out.codes[0], codes)
    torch.testing.assert_close(out.quantized[0], theirs)
    torch.testing.assert_close(out.commitment[0] / out.frames, commitment.sum())
    torch.testing.assert_close(quantizers.arm_state(0)["codebooks"], books(module))


def test_kmeans_from_the_same_first_means() -> None:
    reference = library.vector_quantize_pytorch.kmeans

    x = features(3, (1, 400, D))
    first = x[:, :V]
    means, counts = reference(x, V, 10, sample_fn=lambda samples, number: samples[:, :number])
    ours, ours_counts = kmeans(x, first)
    torch.testing.assert_close(ours, means)
    assert torch.equal(ours_counts.long(), counts.long())


def test_kmeans_start_of_all_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the draw of the first means replaced by the first frames on both sides.

    Frames are many: clusters of one leave residuals near zero, whose nearest codes are all tied.
    """
    module = oracle(kmeans_init=True).train()
    for layer in module.layers:  # type: ignore
        layer._codebook.sample_fn = lambda samples, number: samples[:, :number]
    x = features(4, (1, 2000, D))
    module(x, freeze_codebook=True)
    monkeypatch.setattr(rvq, "_draw", lambda count, wanted, generator: torch.arange(wanted))
    options = RvqOptions(codes=V, kmeans_init=True)
    quantizers = ResidualQuantizers([L], D, seeds=[0], options=options)
    quantizers.initialize(x)
    torch.testing.assert_close(quantizers.arm_state(0)["codebooks"], books(module))
    torch.testing.assert_close(quantizers.arm_state(0)["cluster_size"], sizes(module))


def test_revival_replaces_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which codes are replaced, and by what size, agree; which frames are drawn differs."""
    torch.manual_seed(0)
    module = spread(oracle(decay=0.5, threshold=2), 0.7).train()
    quantizers = ours_for(module, decay=0.5, revive_below=2.0).train()
    x = features(5)
    module(x)
    quantizers(x)
    ours = quantizers.arm_state(0)
    torch.testing.assert_close(ours["cluster_size"], sizes(module))
    kept = ours["cluster_size"] != 2.0
    assert 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(ours["codebooks"][kept], books(module)[kept])


def speech_like(step: int, frames: int = 300) -> Tensor:
    """[1, frames, 768]: a large common part, 32 directions and some noise, as encoders give."""
    fixed = torch.Generator().manual_seed(1)
    mean, directions = torch.randn(768, generator=fixed), torch.randn(32, 768, generator=fixed)
    draw = torch.Generator().manual_seed(2 + step)
    inside = torch.randn(1, frames, 32, generator=draw) @ directions / 32**0.5
    noise = torch.randn(1, frames, 768, generator=draw)
    return torch.add(0.2 * mean + 0.25 * inside, noise, alpha=0.05)


def study_pair(levels: int) -> tuple[torch.nn.Module, ResidualQuantizers]:
    """The study's own width, codes and setting; same first codebooks on both sides."""
    torch.manual_seed(0)
    module = oracle(dim=768, codes=256, levels=levels).train()
    quantizers = ResidualQuantizers([levels], 768, seeds=[0], options=RvqOptions()).train()
    copy_to(module, quantizers)
    return module, quantizers


def library_nearest(vectors: Tensor, codebooks: Tensor) -> Tensor:
    """The library's distance, with |x|^2 and a square root in float32."""
    distances: Tensor = library.vector_quantize_pytorch.cdist(vectors, codebooks)
    return (-distances).argmax(-1)


def library_add(sums: Tensor, vectors: Tensor, codes: Tensor) -> None:
    """The library's sums, by one-hot product."""
    one_hot = torch.nn.functional.one_hot(codes, sums.shape[1]).to(vectors.dtype)
    sums += torch.einsum("h n d, h n c -> h c d", vectors, one_hot)


def test_each_step_differs_by_flipped_near_ties_only() -> None:
    """Ours set to the library's state before each of four steps, then compared.

    Where codes differ, at the first level that does, the two are nearly as near: the study's first
    codes are a hundred times smaller than the features, and the library adds |x|^2 to what tells
    them apart. Against float64 it is the library that chose the farther one.
    """
    module, quantizers = study_pair(16)
    flips = wrong = library_wrong = frames = 0
    for step in range(4):
        copy_to(module, quantizers)
        before = quantizers.arm_state(0)["codebooks"].double()
        x = speech_like(step)
        theirs, codes, _ = module(x)
        out = quantizers(x)
        differ = (out.codes[0] != codes)[0].any(-1)
        torch.testing.assert_close(out.quantized[0][0, ~differ], theirs[0, ~differ])
        for frame in differ.nonzero().flatten().tolist():
            residual = x[0, frame].double()
            for level in range(16):
                distances = (residual - before[level]).norm(dim=-1)
                ours, reference = int(out.codes[0][0, frame, level]), int(codes[0, frame, level])
                if ours != reference:
                    gap = (distances[ours] - distances[reference]).abs()
                    assert gap <= 1e-6 * residual.norm()
                    wrong += ours != int(distances.argmin())
                    library_wrong += reference != int(distances.argmin())
                    break
                residual = residual - before[level, ours]
        if not differ.any():
            torch.testing.assert_close(quantizers.arm_state(0)["codebooks"], books(module))
        flips += int(differ.sum())
        frames += len(differ)
    print(f"{flips} of {frames} frames flipped: wrong {wrong} of ours, {library_wrong} of theirs")
    assert flips <= 0.005 * frames
    assert wrong <= max(1, library_wrong)


def test_a_free_running_trajectory_parts_by_rounding_alone_and_ends_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A flipped near-tie moves a code, which flips more: after ten steps most frames differ.

    A twin of ours with the library's rounding of distances and sums put in agrees in every code of
    every step, so nothing else sets the two apart; and what error they reach stays the same.
    """
    module, quantizers = study_pair(16)
    _, twin = study_pair(16)
    apart = []
    for step in range(10):
        x = speech_like(step)
        theirs, codes, _ = module(x)
        out = quantizers(x)
        with monkeypatch.context() as patch:
            patch.setattr(rvq, "nearest", library_nearest)
            patch.setattr(rvq, "add_by_code", library_add)
            assert torch.equal(twin(x).codes[0], codes)
        apart.append((out.codes[0] != codes).any(-1).float().mean().item())
        mse = (x - theirs).square().mean().item()
        assert out.sums[0].levels()[-1].mse == pytest.approx(mse, rel=0.02)
    torch.testing.assert_close(twin.arm_state(0)["codebooks"], books(module))
    print("share of frames with another code, by step:", [round(share, 3) for share in apart])
    assert apart[0] <= 0.02
