"""CTC against torch's own mean, against a sum over all paths, and where it must not be finite."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from reproduce.objective.ctc import blank_frames, ctc_loss, greedy_decode, required_frames


def batch(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 9, 5, generator=generator, dtype=dtype)
    targets = torch.randint(1, 5, (4, 4), generator=generator)
    return logits, targets, torch.tensor([9, 8, 9, 7]), torch.tensor([4, 3, 1, 2])


def collapse(path: tuple[int, ...], blank: int) -> tuple[int, ...]:
    return tuple(token for token, _ in itertools.groupby(path) if token != blank)


@pytest.mark.parametrize("blank", [0, 2])
def test_loss_is_minus_log_of_the_sum_over_all_paths(blank: int) -> None:
    logits = torch.randn(1, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    target = tuple(token for token in range(3) if token != blank)
    probabilities = logits[0].softmax(-1)
    total = sum(
        float(torch.prod(probabilities[range(5), path]))
        for path in itertools.product(range(3), repeat=5)
        if collapse(path, blank) == target
    )
    terms = ctc_loss(logits, torch.tensor([target]), torch.tensor([5]), torch.tensor([2]), blank)
    assert terms.loss.item() * 2 == pytest.approx(-torch.tensor(total).log().item())


def test_sum_over_utterances_divided_by_their_number_is_torchs_mean() -> None:
    logits, targets, lengths, sizes = batch()
    logits.requires_grad_()
    terms = ctc_loss(logits, targets, lengths, sizes)
    (ours,) = torch.autograd.grad(terms.loss / terms.utterances, logits)
    mean = torch.nn.CTCLoss(reduction="mean", zero_infinity=True)
    reference = mean(logits.log_softmax(-1).transpose(0, 1), targets, lengths, sizes)
    (theirs,) = torch.autograd.grad(reference, logits)
    torch.testing.assert_close(terms.loss / terms.utterances, reference)
    torch.testing.assert_close(ours, theirs)
    assert terms.zeroed == 0


def test_concatenated_targets_equal_padded_ones() -> None:
    logits, targets, lengths, sizes = batch()
    joined = torch.cat([row[:size] for row, size in zip(targets, sizes)])
    padded = ctc_loss(logits, targets, lengths, sizes).loss
    assert ctc_loss(logits, joined, lengths, sizes).loss == padded


def test_required_frames_counts_repetitions_inside_the_target_only() -> None:
    targets = torch.tensor([[1, 1, 1, 2], [1, 2, 2, 2], [3, 3, 3, 3]])
    assert required_frames(targets, torch.tensor([4, 2, 0])).tolist() == [6, 2, 0]
    assert required_frames(targets[:, :0], torch.tensor([0, 0, 0])).tolist() == [0, 0, 0]


def test_impossible_utterances_are_zeroed_counted_and_send_no_gradient() -> None:
    logits = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = torch.tensor([[1, 1, 2], [1, 1, 2], [1, 2, 3]])
    lengths, sizes = torch.tensor([3, 4, 0]), torch.tensor([3, 3, 3])
    terms = ctc_loss(logits, targets, lengths, sizes)
    assert (terms.utterances, terms.zeroed) == (3, 2)
    alone = ctc_loss(logits[1:2], targets[1:2], lengths[1:2], sizes[1:2])
    torch.testing.assert_close(terms.loss, alone.loss)
    (gradient,) = torch.autograd.grad(terms.loss, logits)
    assert gradient[0].eq(0).all()
    assert gradient[2].eq(0).all()
    assert gradient[1, :4].ne(0).all()
    assert gradient[1, 4:].eq(0).all()


def test_empty_target_is_worth_its_blanks() -> None:
    logits = batch()[0][:1]
    terms = ctc_loss(
        logits, torch.zeros(1, 0, dtype=torch.int64), torch.tensor([9]), torch.tensor([0])
    )
    torch.testing.assert_close(terms.loss, -logits.log_softmax(-1)[0, :, 0].sum())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("length", [9, 2])
def test_bad_logits_are_never_zeroed(value: float, length: int) -> None:
    logits, targets, lengths, sizes = batch()
    logits[0, 1, 3] = value
    lengths[0] = length
    assert not ctc_loss(logits, targets, lengths, sizes).loss.isfinite()


def test_float32_under_autocast() -> None:
    logits, targets, lengths, sizes = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = ctc_loss(logits.bfloat16(), targets, lengths, sizes)
    assert terms.loss.dtype == torch.float32
    expected = ctc_loss(logits.bfloat16().float(), targets, lengths, sizes)
    assert terms.loss == expected.loss


def test_greedy_decoding_and_blank_rate() -> None:
    best = torch.tensor([[0, 1, 1, 0, 1, 2, 2], [3, 3, 0, 0, 4, 4, 4], [0, 0, 0, 0, 0, 0, 1]])
    lengths = torch.tensor([7, 5, 6])
    assert greedy_decode(best, lengths) == [[1, 1, 2], [3, 4], []]
    blanks, frames = blank_frames(best, lengths)
    assert (int(blanks), frames) == (2 + 2 + 6, 18)
    assert greedy_decode(best, lengths, blank=1) == [[0, 0, 2], [3, 0, 4], [0]]
