"""The bank of residual quantizers against the obvious version, one frame at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from devices import DEVICES, ORDER_OF_SUMS
from torch import Tensor

from reproduce.errors import DataError
from reproduce.model import codebook, rvq
from reproduce.model.codebook import (
    add_by_code,
    add_by_index,
    add_by_product,
    code_counts,
    kmeans,
    lookup,
    nearest,
)
from reproduce.model.rvq import ResidualQuantizers, RvqOptions

D, V = 12, 7
AS_RUN = RvqOptions(codes=V)
CORRECTED = RvqOptions(
    codes=V, ema="update", padding=False, kmeans_init=True, revive_below=0.5, straight_through=True
)


def features(seed: int = 0, shape: tuple[int, ...] = (3, 11, D)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bank(levels: list[int], options: RvqOptions = AS_RUN, seed: int = 5) -> ResidualQuantizers:
    return ResidualQuantizers(
        levels, D, seeds=[seed + arm for arm in range(len(levels))], options=options
    )


def widen(quantizers: ResidualQuantizers) -> ResidualQuantizers:
    """Codes as far apart as the features, so that every level matters."""
    with torch.no_grad():
        for buffer in (quantizers.codebooks, quantizers.vector_sum):
            buffer.mul_(1 / quantizers.codebooks.std())
    return quantizers


def slow_codes(vector: Tensor, books: Tensor) -> tuple[list[int], list[Tensor]]:
    """One frame through all levels: codes, and the residual left after each level."""
    codes, residuals = [], []
    for book in books:
        code = min(range(len(book)), key=lambda v: float((vector - book[v]).square().sum()))
        vector = vector - book[code]
        codes.append(code)
        residuals.append(vector)
    return codes, residuals


def test_first_codebooks_follow_the_seed_and_the_librarys_distribution() -> None:
    options = RvqOptions(codes=256)
    first = ResidualQuantizers([4, 2], 64, seeds=[1, 2], options=options)
    again = ResidualQuantizers([2, 4], 64, seeds=[2, 1], options=options)
    for name, tensor in first.arm_state(0).items():
        assert torch.equal(tensor, again.arm_state(1)[name])
    books = first.arm_state(0)["codebooks"]
    bound = math.sqrt(6 / (256 * 64))
    assert books.abs().max() <= bound
    assert books.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
    assert not torch.equal(books[0], books[1])


def test_codes_sums_and_statistics_against_one_frame_at_a_time() -> None:
    levels = [2, 4, 1]
    quantizers = widen(bank(levels)).eval()
    x = features()
    out = quantizers(x)
    assert out.frames == 33
    for arm, count in enumerate(levels):
        books = quantizers.arm_state(arm)["codebooks"]
        used: list[list[int]] = [[] for _ in range(count)]
        squared = [0.0] * count
        for b in range(3):
            for f in range(11):
                codes, residuals = slow_codes(x[b, f], books)
                assert out.codes[arm][b, f].tolist() == codes
                torch.testing.assert_close(out.quantized[arm][b, f], x[b, f] - residuals[-1])
                for level in range(count):
                    used[level].append(codes[level])
                    squared[level] += float(residuals[level].square().mean())
        assert out.commitment[arm].item() == pytest.approx(sum(squared), rel=1e-5)
        for level, statistics in enumerate(out.sums[arm].levels()):
            share = torch.tensor(used[level]).bincount(minlength=V) / 33
            assert statistics.mse == pytest.approx(squared[level] / 33, rel=1e-5)
            assert statistics.perplexity == pytest.approx(
                math.exp(-sum(float(p) * math.log(p) for p in share if p > 0))
            )
            assert statistics.dead_codes == int((share == 0).sum())


def test_decoding_the_codes_gives_the_output_and_more_levels_less_error() -> None:
    quantizers = bank([6], replace(AS_RUN, kmeans_init=True)).eval()
    x = features()
    quantizers.initialize(x)
    out = quantizers(x)
    books = quantizers.arm_state(0)["codebooks"]
    decoded = sum(books[level][out.codes[0][..., level]] for level in range(6))
    torch.testing.assert_close(out.quantized[0], decoded)
    errors = [level.mse for level in out.sums[0].levels()]
    assert errors == sorted(errors, reverse=True)


def test_sums_add_up() -> None:
    quantizers = widen(bank([3])).eval()
    x, y = features(0), features(1)
    parts = quantizers(x).sums[0] + quantizers(y).sums[0]
    whole = quantizers(torch.cat([x, y])).sums[0]
    assert torch.equal(parts.counts, whole.counts)
    torch.testing.assert_close(parts.squared_error, whole.squared_error)


@pytest.mark.parametrize("ema", ["micro_batch", "update"])
def test_padding_left_out_changes_nothing(ema: str) -> None:
    options = replace(AS_RUN, padding=False, ema=ema)  # type: ignore[arg-type]
    lengths = torch.tensor([11, 4, 8])
    x = features().requires_grad_()
    noisy = x.detach().clone()
    for row, length in enumerate(lengths.tolist()):
        noisy[row, length:] = 1e3
    outputs = []
    for values in (x, noisy):
        quantizers = widen(bank([1, 3], options))
        outputs.append((quantizers(values, lengths), quantizers))
        quantizers.apply_update()
    (clean, left), (padded, right) = outputs
    assert clean.frames == padded.frames == 23
    assert torch.equal(left.codebooks, right.codebooks)
    for arm in range(2):
        torch.testing.assert_close(clean.quantized[arm], padded.quantized[arm])
        assert torch.equal(clean.codes[arm], padded.codes[arm])
        assert clean.quantized[arm][1, 4:].eq(0).all()
        assert clean.codes[arm][1, 4:].eq(-1).all()
    torch.testing.assert_close(clean.commitment, padded.commitment)


def test_straight_through_has_unit_gradient_whatever_the_levels() -> None:
    x = features().requires_grad_()
    upstream = features(9)
    for options, expected in (
        (replace(AS_RUN, straight_through=True), upstream),
        (AS_RUN, None),
    ):
        out = widen(bank([1, 4], options))(x)
        plain = widen(bank([1, 4], options))(x.detach())
        for arm in range(2):
            assert torch.equal(out.quantized[arm], plain.quantized[arm])
            if expected is None:
                assert not out.quantized[arm].requires_grad
            else:
                (gradient,) = torch.autograd.grad((out.quantized[arm] * upstream).sum(), x)
                assert torch.equal(gradient, expected)


def test_gradient_of_the_commitment_loss() -> None:
    lengths = torch.tensor([11, 4, 8])
    x = features().requires_grad_()
    quantizers = widen(bank([3, 1], replace(AS_RUN, padding=False))).eval()
    out = quantizers(x, lengths)
    for arm in range(2):
        books, codes = quantizers.arm_state(arm)["codebooks"], out.codes[arm]
        obvious = torch.zeros(())
        for b, length in enumerate(lengths.tolist()):
            total = torch.zeros(length, D)
            for level, book in enumerate(books):
                total = total + book[codes[b, :length, level]]
                obvious = obvious + (x[b, :length] - total).square().mean(-1).sum()
        torch.testing.assert_close(out.commitment[arm], obvious)
        (ours,) = torch.autograd.grad(out.commitment[arm], x, retain_graph=True)
        (theirs,) = torch.autograd.grad(obvious, x)
        torch.testing.assert_close(ours, theirs)


def test_ema_by_the_formula() -> None:
    quantizers = widen(bank([1], replace(AS_RUN, decay=0.9)))
    x, before = features(), quantizers.arm_state(0)
    codes = quantizers(x).codes[0].flatten()
    size = 0.9 * before["cluster_size"][0] + 0.1 * codes.bincount(minlength=V)
    total = torch.stack([x.flatten(0, 1)[codes == v].sum(0) for v in range(V)])
    vectors = 0.9 * before["vector_sum"][0] + 0.1 * total
    smooth = (size + 1e-5) / (size.sum() + V * 1e-5) * size.sum()
    after = quantizers.arm_state(0)
    torch.testing.assert_close(after["cluster_size"][0], size)
    torch.testing.assert_close(after["codebooks"][0], vectors / smooth.unsqueeze(-1))
    assert int(after["moves"]) == 1


def test_nothing_moves_in_eval_mode() -> None:
    quantizers = bank([2]).eval()
    before = quantizers.arm_state(0)
    quantizers(features())
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in quantizers.arm_state(0).items()
    )
    assert all(tensor.eq(0).all() for tensor in quantizers.pending())


def test_one_update_is_the_same_in_any_number_of_pieces_and_on_any_rank() -> None:
    x = features(shape=(4, 11, D))
    options = replace(CORRECTED, revive_below=3.0)

    def run(split: list[list[int]]) -> ResidualQuantizers:
        """split: the micro-batches of each rank; sums over ranks by hand."""
        ranks = []
        for micro_batches in split:
            quantizers = bank([3, 1], options)
            quantizers.initialize(x)
            for index in micro_batches:
                quantizers(x[index : index + 1], micro_batch=(index, 4))
            ranks.append(quantizers)
        for tensors in zip(*(rank.pending() for rank in ranks)):
            total = torch.stack(list(tensors)).sum(0)
            for tensor in tensors:
                tensor.copy_(total)
        for rank in ranks:
            rank.apply_update()
        assert all(torch.equal(rank.codebooks, ranks[0].codebooks) for rank in ranks)
        return ranks[0]

    one = run([[0, 1, 2, 3]])
    for split in ([[0, 1], [2, 3]], [[0], [1], [2], [3]], [[0, 1, 2, 3], []]):
        torch.testing.assert_close(run(split).codebooks, one.codebooks)


def test_dead_codes_become_frames_of_the_update() -> None:
    options = replace(AS_RUN, revive_below=2.5, decay=0.5)
    quantizers = widen(bank([2], options))
    x, before = features(), quantizers.arm_state(0)
    out = quantizers(x)
    frames, after = x.flatten(0, 1), quantizers.arm_state(0)
    for level in range(2):
        size = 0.5 * before["cluster_size"][level] + 0.5 * out.sums[0].counts[level]
        dead = size < 2.5
        assert 0 < dead.sum() < V
        revived = after["codebooks"][level][dead]
        for code in revived:
            assert (frames - code).abs().amax(-1).min() == 0
        assert len({tuple(code.tolist()) for code in revived}) == len(revived)
        assert after["cluster_size"][level][dead].eq(2.5).all()
        assert after["vector_sum"][level][dead].equal(2.5 * revived)
        torch.testing.assert_close(after["cluster_size"][level][~dead], size[~dead])
        frames = frames - before["codebooks"][level][out.codes[0].flatten(0, 1)[:, level]]
    again = widen(bank([2], options))
    again(x)
    assert torch.equal(again.codebooks, quantizers.codebooks)


def test_reviving_needs_to_know_the_micro_batch() -> None:
    quantizers = bank([1], replace(CORRECTED, kmeans_init=False))
    with pytest.raises(ValueError, match="micro_batch"):
        quantizers(features())
    quantizers.eval()(features())


def test_kmeans_start() -> None:
    x, lengths = features(shape=(4, 30, D)), torch.tensor([30, 5, 30, 17])
    quantizers = bank([2, 3], CORRECTED)
    with pytest.raises(RuntimeError, match="initialize"):
        quantizers(x)
    quantizers.initialize(x, lengths)
    twin = bank([2, 3], CORRECTED)
    twin.initialize(torch.cat([row[:length] for row, length in zip(x, lengths.tolist())]))
    assert torch.equal(quantizers.codebooks, twin.codebooks)
    untrained = widen(bank([2, 3], replace(CORRECTED, kmeans_init=False))).eval()
    for arm in range(2):
        state = quantizers.arm_state(arm)
        assert bool(state["initialized"])
        assert state["cluster_size"].sum(-1).eq(82).all()
        ours = quantizers.eval()(x, lengths).sums[arm].levels()[-1].mse
        assert ours < 0.7 * untrained(x, lengths).sums[arm].levels()[-1].mse


def test_kmeans_with_fewer_frames_than_codes_stays_finite() -> None:
    quantizers = bank([3], CORRECTED)
    quantizers.initialize(features(shape=(4, D)))
    out = quantizers.eval()(features(shape=(1, 4, D)))
    assert out.quantized[0].isfinite().all()
    with pytest.raises(ValueError, match="no frames"):
        quantizers.initialize(features(shape=(0, D)))


def test_kmeans_against_loops() -> None:
    x, means = features(shape=(1, 40, D)), features(1, (1, 5, D))
    means[0, 4] = 1e3  # never anyone's nearest
    ours, sizes = kmeans(x, means)
    slow = means[0].clone()
    for _ in range(10):
        owner = [slow_codes(vector, slow.unsqueeze(0))[0][0] for vector in x[0]]
        for v in range(5):
            mine = [vector for vector, o in zip(x[0], owner) if o == v]
            slow[v] = torch.stack(mine).mean(0) if mine else slow[v]
    torch.testing.assert_close(ours[0], slow)
    assert sizes[0].tolist() == [owner.count(v) for v in range(5)]


@DEVICES
@pytest.mark.parametrize("options", [AS_RUN, CORRECTED], ids=["as_run", "corrected"])
def test_an_arm_in_the_bank_equals_the_arm_alone(options: RvqOptions, device: str) -> None:
    levels, lengths = [1, 4, 2], torch.tensor([11, 6, 9])
    near = dict.fromkeys(("rtol", "atol"), ORDER_OF_SUMS[device])
    together = bank(levels, options).to(device)
    alone = [
        ResidualQuantizers([count], D, seeds=[5 + arm], options=options).to(device)
        for arm, count in enumerate(levels)
    ]
    for quantizers in (together, *alone):
        if options.kmeans_init:
            quantizers.initialize(features(50).to(device), lengths)
    for step in range(6):
        x = features(step).to(device)
        joint = together(x, None if options.padding else lengths, micro_batch=(0, 1))
        for arm, single in enumerate(alone):
            out = single(x, None if options.padding else lengths, micro_batch=(0, 1))
            assert torch.equal(out.codes[0], joint.codes[arm])
            torch.testing.assert_close(out.quantized[0], joint.quantized[arm], **near)
            torch.testing.assert_close(out.commitment[0], joint.commitment[arm], **near)
        if options.ema == "update":
            for quantizers in (together, *alone):
                quantizers.apply_update()
    for arm, single in enumerate(alone):
        for name, tensor in single.arm_state(0).items():
            torch.testing.assert_close(together.arm_state(arm)[name], tensor, **near)


def test_select_goes_on_as_the_whole_bank_would() -> None:
    whole = bank([1, 4, 2], replace(CORRECTED, kmeans_init=False))
    whole(features(0), micro_batch=(0, 2))
    part = whole.select([2, 1])
    for quantizers in (whole, part):
        quantizers(features(1), micro_batch=(1, 2))
        quantizers.apply_update()
    for new, old in enumerate([2, 1]):
        for name, tensor in part.arm_state(new).items():
            torch.testing.assert_close(tensor, whole.arm_state(old)[name], rtol=1e-6, atol=1e-6)


def test_arm_state_of_another_shape_is_refused() -> None:
    quantizers = bank([1, 2])
    with pytest.raises(DataError, match="codebooks"):
        quantizers.load_arm_state(0, quantizers.arm_state(1))
    with pytest.raises(DataError, match="wanted"):
        quantizers.load_arm_state(0, {})


def test_float32_under_autocast() -> None:
    x = features().bfloat16()
    plain = widen(bank([3])).eval()(x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = widen(bank([3])).eval()(x)
    assert torch.equal(out.codes[0], plain.codes[0])
    assert out.quantized[0].dtype == torch.float32


@DEVICES
@pytest.mark.parametrize("add", [add_by_code, add_by_index, add_by_product])
def test_sums_by_code(add: Callable[[Tensor, Tensor, Tensor], None], device: str) -> None:
    """On top of what is there, in a slice of a larger buffer, and alike in every run."""
    vectors = features(shape=(2, 40, D)).to(device)
    codes = torch.randint(V - 1, (2, 40), generator=torch.Generator().manual_seed(0)).to(device)
    found = []
    for _ in range(2):
        sums = torch.ones(4, V, D, device=device)
        add(sums[1:3], vectors, codes)
        found.append(sums)
    if (add, device) != (add_by_index, "cuda"):  # which has no fixed order
        assert torch.equal(*found)
    expected = torch.ones(4, V, D)
    for book in range(2):
        for vector, code in zip(vectors[book].cpu(), codes[book].tolist()):
            expected[book + 1, code] += vector
    torch.testing.assert_close(found[0].cpu(), expected)
    counts = code_counts(codes, V)
    assert [row.tolist() for row in counts] == [row.bincount(minlength=V).tolist() for row in codes]


@pytest.mark.parametrize("options", [AS_RUN, CORRECTED], ids=["as_run", "corrected"])
def test_sums_by_product_train_the_same_codebooks(
    options: RvqOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU does, on any device."""
    found = []
    for add in (add_by_index, add_by_product):
        for module in (rvq, codebook):
            monkeypatch.setattr(module, "add_by_code", add)
        quantizers = bank([3, 1], options)
        if options.kmeans_init:
            quantizers.initialize(features(50))
        for step in range(5):
            quantizers(features(step), micro_batch=(0, 1))
            if options.ema == "update":
                quantizers.apply_update()
        found.append(quantizers.codebooks)
    torch.testing.assert_close(*found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [AS_RUN, CORRECTED], ids=["as_run", "corrected"])
def test_a_gpu_trains_the_codebooks_of_the_cpu(options: RvqOptions) -> None:
    found = []
    for device in ("cpu", "cuda", "cuda"):
        quantizers = widen(bank([3, 1], options)).to(device)
        if options.kmeans_init:
            quantizers.initialize(features(50).to(device))
        for step in range(5):
            out = quantizers(features(step).to(device), micro_batch=(0, 1))
            if options.ema == "update":
                quantizers.apply_update()
        found.append((out.codes[0].cpu(), quantizers.codebooks.cpu()))
    (codes, books), (gpu_codes, gpu_books), again = found
    assert torch.equal(gpu_codes, codes)
    torch.testing.assert_close(gpu_books, books, rtol=1e-4, atol=1e-5)
    assert torch.equal(gpu_books, again[1])  # and the same each time


def test_nearest_and_lookup_of_the_codes_themselves() -> None:
    books = features(shape=(2, V, D))
    codes = torch.arange(V).flip(0).expand(2, -1)
    assert torch.equal(nearest(lookup(books, codes), books), codes)
