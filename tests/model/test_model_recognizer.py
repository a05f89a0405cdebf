"""The bank of heads: an arm in it is the arm alone; gradients, modes, saving and loading."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from devices import DEVICES, ORDER_OF_SUMS
from torch import Tensor, nn

from reproduce.errors import DataError
from reproduce.model.encoder import Encoder, EncoderConfig
from reproduce.model.recognizer import HeadBank, Recognizer
from reproduce.model.rvq import RvqOptions
from reproduce.objective.ctc import ctc_loss

D, V = 16, 6
ARMS = {"no_rvq": 0, "rvq_1": 1, "rvq_4": 4, "rvq_2": 2}
AS_RUN = RvqOptions(codes=9)
CORRECTED = RvqOptions(
    codes=9, ema="update", padding=False, kmeans_init=True, revive_below=1.0, straight_through=True
)
CONFIG = replace(
    EncoderConfig.base(),
    conv_channels=(8,) * 7,
    width=D,
    layers=2,
    heads=2,
    feed_forward=24,
    position_kernel=8,
    position_groups=2,
)
LENGTHS = torch.tensor([12, 7, 10])


def features(seed: int) -> Tensor:
    return torch.randn(3, 12, D, generator=torch.Generator().manual_seed(seed))


def bank(arms: dict[str, int], options: RvqOptions = AS_RUN, dropout: float = 0.0) -> HeadBank:
    return HeadBank(arms, D, V, seed=3, head_dropout=dropout, options=options)


def recognizer(options: RvqOptions = AS_RUN, **settings: str) -> Recognizer:
    torch.manual_seed(0)
    return Recognizer(Encoder(CONFIG), bank(ARMS, options), **settings)  # type: ignore[arg-type]


def train(heads: HeadBank, steps: int, drop: str = "", at: int = -1) -> dict[str, list[float]]:
    """A few updates of two micro-batches, one optimizer an arm, clipped an arm; losses by arm."""
    options, device = heads.options, next(heads.parameters()).device
    if options.kmeans_init and heads.quantizers is not None:
        heads.quantizers.initialize(features(99).to(device), LENGTHS)
    optimizers = {arm: torch.optim.AdamW(heads.arm_parameters(arm), 0.1) for arm in heads.arms}
    losses: dict[str, list[float]] = {arm: [] for arm in heads.arms}
    targets, sizes = torch.tensor([[1, 2, 2], [3, 1, 1], [5, 4, 1]]), torch.tensor([3, 2, 3])
    for step in range(steps):
        if step == at:
            heads.drop(drop)
        for part in range(2):
            torch.manual_seed(100 * step + part)
            x = features(10 * step + part).to(device)
            out = heads(x, LENGTHS, micro_batch=(part, 2))
            for arm, logits in out.logits.items():
                loss = ctc_loss(logits, targets, LENGTHS, sizes).loss
                torch.autograd.backward(loss)
                losses[arm].append(loss.item())
        for arm in heads.arms:
            nn.utils.clip_grad_norm_(heads.arm_parameters(arm), 1.0)
            optimizers[arm].step()
            optimizers[arm].zero_grad()
        if options.ema == "update" and heads.quantizers is not None:
            heads.quantizers.apply_update()
    return losses


def assert_same_state(
    left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float = 1e-6
) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=tolerance, atol=tolerance, msg=name)


def test_first_weights_follow_from_seed_and_arm_alone() -> None:
    heads = HeadBank({"a": 0, "b": 2}, 256, 32, seed=1)
    assert_same_state(heads.arm_state("b"), HeadBank({"b": 2}, 256, 32, seed=1).arm_state("b"))
    weight = heads.head("a").weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert heads.head("a").bias.eq(0).all()
    assert not torch.equal(weight, heads.head("b").weight)
    other = HeadBank({"a": 0}, 256, 32, seed=2)
    assert not torch.equal(weight, other.head("a").weight)


def test_logits_are_the_head_of_the_quantized_features() -> None:
    heads = bank(ARMS).eval()
    out = heads(features(0), LENGTHS)
    torch.testing.assert_close(out.logits["no_rvq"], heads.head("no_rvq")(features(0)))
    state = heads.arm_state("rvq_2")
    books, codes = state["rvq.codebooks"], out.codes["rvq_2"]
    quantized = books[0][codes[..., 0]] + books[1][codes[..., 1]]
    expected = quantized @ state["lm_head.weight"].T + state["lm_head.bias"]
    torch.testing.assert_close(out.logits["rvq_2"], expected)
    assert out.commitment.keys() == out.sums.keys() == {"rvq_1", "rvq_4", "rvq_2"}
    assert out.frames == 36


@DEVICES
@pytest.mark.parametrize("options", [AS_RUN, CORRECTED], ids=["as_run", "corrected"])
def test_an_arm_trained_in_the_bank_equals_the_arm_trained_alone(
    options: RvqOptions, device: str
) -> None:
    together = bank(ARMS, options, dropout=0.2).to(device)
    losses = train(together, 5)
    for arm, levels in ARMS.items():
        alone = bank({arm: levels}, options, dropout=0.2).to(device)
        assert train(alone, 5)[arm] == pytest.approx(losses[arm], rel=ORDER_OF_SUMS[device])
        assert_same_state(alone.arm_state(arm), together.arm_state(arm), ORDER_OF_SUMS[device])
    assert losses["no_rvq"][-1] < losses["no_rvq"][0]


@pytest.mark.parametrize("dropped", ["no_rvq", "rvq_4"])
def test_a_dropped_arm_changes_nothing_for_the_others(dropped: str) -> None:
    whole, part = bank(ARMS), bank(ARMS)
    losses, fewer = train(whole, 4), train(part, 4, drop=dropped, at=2)
    assert dropped not in part.arms
    assert len(fewer[dropped]) == 4
    for arm in part.arms:
        assert fewer[arm] == pytest.approx(losses[arm], rel=1e-6)
        assert_same_state(part.arm_state(arm), whole.arm_state(arm))


def test_the_last_arm_can_be_dropped() -> None:
    heads = bank({"rvq_1": 1})
    heads.drop("rvq_1")
    assert heads(features(0), LENGTHS).logits == {}


def test_states_go_from_bank_to_arm_and_back() -> None:
    trained = bank(ARMS)
    train(trained, 2)
    fresh = bank(ARMS)
    for arm in ARMS:
        alone = trained.alone(arm)
        fresh.load_arm_state(arm, alone.arm_state(arm))
    for ours, theirs in zip(fresh.state_dict().items(), trained.state_dict().items()):
        assert ours[0] == theirs[0]
        assert torch.equal(ours[1], theirs[1])
    with pytest.raises(DataError, match="arm no_rvq"):
        fresh.load_arm_state("no_rvq", trained.arm_state("rvq_1"))
    with pytest.raises(DataError, match="tensors"):
        fresh.load_arm_state("rvq_2", trained.arm_state("no_rvq"))


def test_half_precision_features() -> None:
    heads = bank(ARMS).eval()
    half = features(0).half()
    out, wide = heads(half, LENGTHS), heads(half.float(), LENGTHS)
    for arm in ARMS:
        assert torch.equal(out.logits[arm], wide.logits[arm])


def test_modes_of_the_encoder() -> None:
    waveform, samples = torch.randn(2, 4000), torch.tensor([4000, 3000])
    model = recognizer(encoder_mode="frozen_eval").train()
    assert not model.encoder.training
    assert model.heads.training
    first, second = (model.encode(waveform, samples)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert not first.requires_grad

    model.set_encoder_mode("frozen_train")
    assert model.encoder.training
    first, second = (model.encode(waveform, samples)[0] for _ in range(2))
    assert not torch.equal(first, second)
    assert not first.requires_grad

    model.set_encoder_mode("trained")
    assert model.encode(waveform, samples)[0].requires_grad


@pytest.mark.parametrize("extractor", ["group_norm", "layer_norm"])
def test_in_eval_mode_features_do_not_depend_on_the_batch(extractor: str) -> None:
    torch.manual_seed(0)
    encoder = Encoder(replace(CONFIG, extractor=extractor, conv_bias=extractor == "layer_norm"))
    waveform, samples = torch.randn(3, 4000), torch.tensor([4000, 3000, 200])
    model = Recognizer(encoder, bank(ARMS, CORRECTED)).eval()
    features, frames = model.encode(waveform, samples)
    assert frames.tolist() == [12, 9, 0]
    assert features[2].eq(0).all() or extractor == "layer_norm"
    for row in (0, 1):
        alone = encoder(waveform[row : row + 1, : samples[row]]).features[0]
        torch.testing.assert_close(features[row, : frames[row]], alone, rtol=1e-5, atol=1e-5)
    # told to count padding as speech, it has to see the padding
    padded = Recognizer(encoder, bank(ARMS, CORRECTED), input_length="padded").eval()
    torch.testing.assert_close(padded.encode(waveform, samples)[0], encoder(waveform).features)


def test_one_pass_of_the_encoder_feeds_all_arms() -> None:
    model = recognizer().eval()
    waveform, samples = torch.randn(2, 4000), torch.tensor([4000, 3000])
    calls: list[int] = []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    out = model(waveform, samples)
    assert len(calls) == 1
    kept, frames = model.encode(waveform, samples)
    again = model.forward_features(kept, frames)
    assert out.logits.keys() == ARMS.keys()
    for arm in ARMS:
        assert torch.equal(out.logits[arm], again.logits[arm])


def test_input_length() -> None:
    waveform, samples = torch.randn(2, 4000), torch.tensor([4000, 3000])
    own = recognizer().eval()(waveform, samples)
    assert own.lengths.tolist() == [12, 9]
    model = recognizer(input_length="padded").eval()
    padded = model(waveform, samples)
    assert padded.lengths.tolist() == [12, 12]
    kept = model.forward_features(torch.zeros(2, 12, D), torch.tensor([12, 9]))
    assert kept.lengths.tolist() == [12, 12]


@pytest.mark.parametrize("through", [True, False])
def test_gradients_reach_the_encoder_only_straight_through(through: bool) -> None:
    options = replace(CORRECTED, kmeans_init=False, straight_through=through)
    model = recognizer(options, encoder_mode="trained").train()
    out = model(torch.randn(2, 4000), micro_batch=(0, 1))
    assert isinstance(model.encoder, Encoder)
    weight = model.encoder.mask_embedding, *model.encoder.transformer.parameters()
    logits, commitment = out.logits["rvq_2"].square().sum(), out.commitment["rvq_2"]
    for scalar, expected in ((logits, through), (commitment, True)):
        gradients = torch.autograd.grad(scalar, weight, retain_graph=True, allow_unused=True)
        assert any(g is not None and bool(g.ne(0).any()) for g in gradients) == expected


def test_codebooks_start_from_the_first_update() -> None:
    batches = [(torch.randn(2, 4000), torch.tensor([4000, 3000])) for _ in range(3)]
    model = recognizer(CORRECTED).train()
    assert model.needs_codebooks
    model.initialize_codebooks(batches)
    assert not model.needs_codebooks
    assert model.training
    assert model.heads.training
    frames = 3 * (12 + 9)
    assert model.heads.arm_state("rvq_4")["rvq.cluster_size"].sum(-1).eq(frames).all()
    twin = recognizer(CORRECTED)
    twin.initialize_codebooks([model.encode(*batch) for batch in batches], features=True)
    assert_same_state(twin.heads.arm_state("rvq_4"), model.heads.arm_state("rvq_4"))


def test_head_starts_as_in_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(**CONFIG.to_huggingface(), vocab_size=500)
    torch.manual_seed(0)
    theirs = transformers.Wav2Vec2ForCTC(config).lm_head
    ours = HeadBank({"a": 0}, D, 500, seed=0).head("a")
    assert ours.weight.std().item() == pytest.approx(theirs.weight.std().item(), rel=0.05)
    assert torch.equal(ours.bias, theirs.bias)


def test_an_arm_may_be_called_anything() -> None:
    """Also what a ModuleDict has for itself, or what it refuses."""
    names = ["forward", "keys", "pop", "type", "a.b", "a%2Eb"]
    bank = HeadBank(dict.fromkeys(names, 1), 8, 5, seed=0, options=RvqOptions(codes=4))
    assert len(bank(torch.randn(1, 3, 8), torch.tensor([3])).logits) == len(names)
    bank.drop("keys")
    assert list(bank.alone("a.b").arms) == ["a.b"]
    assert not torch.equal(bank.head("a.b").weight, bank.head("a%2Eb").weight)
