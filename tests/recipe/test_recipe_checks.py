"""Combinations of keys that can't work."""

import json

import pytest

from reproduce.errors import RecipeError
from reproduce.recipe import Recipe, load_recipe
from reproduce.recipe.checks import combination_problems


def problems(spec: str, *sets: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(spec, sets)
    return caught.value.problems


def test_the_defaults_are_free_of_problems():
    assert combination_problems(Recipe()) == []


@pytest.mark.parametrize(
    ("spec", "sets", "found"),
    [
        ("as-run", ["seeds=[1, 2, 1]"], "seeds: the same seed twice in [1, 2, 1]"),
        (
            "as-run",
            ["compute.processes=3", "cluster.nodes=2"],
            "cluster.nodes: 3 processes (compute.processes) can't be spread evenly over 2 machines",
        ),
        ("as-run", ["name='.'"], "name: names the work folder; '.' can't"),
        ("as-run", ["name=''"], "name: names the work folder; '' can't"),
        (
            "as-run",
            ["data.transcripts=a.csv"],
            "data.transcripts: only for corpus folder, found corpus librispeech",
        ),
        (
            "as-run",
            ["data.corpus=folder"],
            "data.transcripts: corpus folder needs a CSV, TSV or JSONL of transcripts",
        ),
        ("mini", ["data.root=/a"], "data.root: corpus synthetic reads no folder; set data.corpus"),
        ("as-run", ["data.train_parts=[]"], "data.train_parts: at least one part is needed"),
        ("as-run", ["data.valid_parts=[]"], "data.valid_parts: at least one part is needed"),
        (
            "as-run",
            ["data.train_parts=[a, b, c]", "data.valid_parts=[b]", "data.test_parts=[c]"],
            "data.train_parts: b, c is also held out",
        ),
        (
            "mini",
            ["data.synthetic.min_seconds=9", "data.synthetic.max_seconds=3"],
            "data.synthetic.min_seconds: 9.0 is above max_seconds 3.0",
        ),
        ("as-run", ["model.heads=7"], "model.heads: 7 does not divide width 768"),
        ("as-run", ["model.position_groups=7"], "model.position_groups: 7 does not divide width"),
        (
            "as-run",
            ["model.conv_strides=[5, 2]"],
            "model.conv_channels: conv_channels, conv_kernels and conv_strides differ in length",
        ),
        (
            "as-run",
            ["pretrain.max_seconds=5"],
            "pretrain.max_seconds: 5.0 is not above min_seconds 5.0",
        ),
        (
            "as-run",
            ["pretrain.crop_seconds=0.1"],
            "pretrain.crop_seconds: 0.1 is shorter than one masked span, 0.2",
        ),
        (
            "as-run",
            ["pretrain.masking.probability=0"],
            "pretrain.masking.probability: 0 leaves nothing to predict",
        ),
        ("as-run", ["pretrain.gumbel.floor=3"], "pretrain.gumbel.floor: 3.0 is above gumbel.start"),
        (
            "as-run",
            ["pretrain.schedule.hold=0.5"],
            "pretrain.schedule.hold: goes with kind tri_stage, found linear",
        ),
        (
            "as-run",
            ["finetune.schedule.hold=0.5"],
            "finetune.schedule.warmup: warmup + hold + decay is 1.3, above 1",
        ),
        (
            "as-run",
            ["finetune.schedule.decay_form=exponential"],
            "finetune.schedule.final_scale: an exponential decay never reaches 0",
        ),
        (
            "as-run",
            ["finetune.transformer_from=0.5"],
            "finetune.transformer_from: with train head the transformer is never trained",
        ),
        (
            "as-run",
            ["finetune.rvq.commitment=0.5"],
            "finetune.rvq.commitment: with a frozen encoder nothing can follow the codes",
        ),
        (
            "as-run",
            ["finetune.encoder_mode=eval"],
            "finetune.masking.probability: an encoder in eval mode is not masked; set it to 0",
        ),
        (
            "as-written",
            ["finetune.masking.channel_probability=0.5"],
            "finetune.masking.channel_probability: an encoder in eval mode is not masked",
        ),
        (
            "corrected",
            ["finetune.encoder_mode=train"],
            "finetune.encoder_mode: a trained encoder is in train mode anyway; leave it at eval",
        ),
        (
            "as-run",
            ["finetune.encoder=icsl_8c/seed-42"],
            "finetune.encoder: no pretraining arm 'icsl_8c'; did you mean icsl_8cb?",
        ),
        (
            "as-run",
            ["finetune.encoder=icsl_8cb/seed-1"],
            "finetune.encoder: seed 1 is not among seeds [42]",
        ),
        (
            "as-run",
            ["finetune.encoder=icsl_8cb/seed-x"],
            "finetune.encoder: seed x is not among seeds [42]",
        ),
        (
            "as-run",
            ["finetune.arms.rvq_2.encoder=finetune/rvq_3/seed-{seed}"],
            "finetune.arms.rvq_2.encoder: no fine-tuning arm 'rvq_3'; did you mean rvq_",
        ),
        (
            "as-run",
            ["finetune.arms.rvq_2.encoder=finetune/rvq_2/seed-{seed}"],
            "finetune.arms.rvq_2.encoder: a circle, rvq_2 on rvq_2; one of them needs an encoder",
        ),
    ],
)
def test_impossible_combinations(spec, sets, found):
    (problem,) = problems(spec, *sets)
    assert problem.startswith(found)


def test_a_problem_of_all_arms_is_told_once_and_that_of_some_by_arm():
    (once,) = problems("as-run", "pretrain.quantizer.codebooks=1", "pretrain.masking.probability=0")
    assert once.startswith("pretrain.masking.probability")
    assert problems("as-run", "pretrain.quantizer.codevector_dim=252") == [
        f"pretrain.arms.{arm}.quantizer.codebooks: {arm.split('_')[-1][:-2]} does not divide "
        "quantizer.codevector_dim 252"
        for arm in ("no_icsl_8cb", "icsl_8cb", "no_icsl_16cb", "icsl_16cb")
    ]


def test_an_arm_is_checked_with_its_own_values():
    assert problems("as-run", "pretrain.arms.icsl_2cb.quantizer.codebooks=1") == [
        "pretrain.arms.icsl_2cb.icsl.weight: needs at least two codebooks (from as-run)"
    ]
    (problem,) = problems("as-run", "finetune.arms.rvq_2.schedule.decay=0.9")
    assert problem.startswith("finetune.arms.rvq_2.schedule.warmup: warmup + hold + decay is 1.3")
    (problem,) = problems("as-run", "finetune.arms.rvq_2.encoder=nobody/seed-42")
    assert problem.startswith("finetune.arms.rvq_2.encoder: no pretraining arm 'nobody'")


@pytest.mark.parametrize("name", ["rvq.2", "a/b", "a b", "", "..", "-a", "größe", "a\n"])
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_an_arm_has_a_plain_name(tmp_path, stage, name):
    layer = tmp_path / "mine.yaml"
    layer.write_text(json.dumps({stage: {"arms": {name: {}}}}))
    (problem,) = problems(f"as-written+{layer}")
    assert problem.startswith(f"{stage}.arms.{name}: an arm's name has letters, digits, _ and - on")


def test_icsl_without_accumulation_needs_the_as_run_scaling():
    (problem,) = problems("as-run", "pretrain.icsl.scaling=per_frame")
    assert problem.startswith("pretrain.arms.icsl_2cb.icsl.divided_by_accumulation: false goes")


MORE = ("plain8_rvq_4", "icsl8_rvq_4", "rvq_4_10min")


def test_a_trained_encoder_needs_the_straight_through_gradient():
    assert problems("corrected", "finetune.rvq.straight_through=false") == [
        f"finetune.arms.{arm}.rvq.straight_through: train transformer gets no gradient "
        "without it (from --set finetune.rvq.straight_through=false)"
        for arm in (*(f"rvq_{n}" for n in (1, 2, 4, 8, 16)), *MORE)
    ]


def test_combinations_with_a_value_that_was_wrong_itself_are_not_judged():
    """rvq falls back to its default here, which as-run's padded lengths don't go with."""
    assert problems("as-run", "finetune.rvq=5") == [
        "finetune.rvq: should be a section with keys, found 5 (from --set finetune.rvq=5)"
    ]


def test_an_encoder_of_this_recipe_by_seed():
    assert load_recipe("as-run", ["finetune.encoder=icsl_8cb/seed-{seed}"])
    assert load_recipe("as-run", ["finetune.encoder=icsl_8cb/seed-42"])
    assert load_recipe("as-run", ["finetune.encoder=/some/where/seed-9"])
    assert load_recipe("as-run", ["finetune.arms.rvq_2.encoder=finetune/no_rvq/seed-{seed}"])


def test_each_arm_of_a_circle_is_named():
    sets = [
        f"finetune.arms.rvq_{a}.encoder=finetune/rvq_{b}/seed-{{seed}}" for a, b in ("12", "21")
    ]
    assert [line.split(" (from")[0] for line in problems("as-run", *sets)] == [
        f"finetune.arms.rvq_{a}.encoder: a circle, rvq_{b} on rvq_{a} on rvq_{b}; one of them "
        "needs an encoder from elsewhere"
        for a, b in ("12", "21")
    ]
