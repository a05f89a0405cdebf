"""The shipped recipes against the study's protocol tables, value by value."""

import math
from itertools import pairwise

import numpy as np
import pytest

from reproduce.data.batches import Plan
from reproduce.recipe import load_recipe, shipped_recipes, yaml12
from reproduce.tasks.wiring import learning_rate_of, plan_of
from reproduce.training.schedule import GumbelTemperature, micro_batch_weights

PROTOCOLS = ("as-written", "as-run", "corrected")
CODEBOOKS = (2, 4, 8, 16)
LEVELS = (1, 2, 4, 8, 16)
PUBLISHED_ARMS = [f"{prefix}icsl_{n}cb" for n in CODEBOOKS for prefix in ("no_", "")]
PLAIN_8, ICSL_8 = ["plain8_no_rvq", "plain8_rvq_4"], ["icsl8_no_rvq", "icsl8_rvq_4"]
TEN_MINUTES = ["no_rvq_10min", "rvq_4_10min"]

# dotted path: (as-written, as-run, corrected), or one value for all three
TABLE = {
    "seeds": ([42], [42], [1, 2, 3, 4, 5]),
    # model: wav2vec 2.0 base; as run with the configuration of facebook/wav2vec2-base
    "model.extractor": "group_norm",
    "model.conv_channels": [512] * 7,
    "model.conv_kernels": [10, 3, 3, 3, 3, 2, 2],
    "model.conv_strides": [5, 2, 2, 2, 2, 2, 2],
    "model.conv_bias": False,
    "model.width": 768,
    "model.layers": 12,
    "model.heads": 12,
    "model.feed_forward": 3072,
    "model.position_kernel": 128,
    "model.position_groups": 16,
    "model.layer_norm_first": False,
    "model.dropout": 0.1,
    "model.attention_dropout": 0.1,
    "model.activation_dropout": (0.1, 0.0, 0.0),
    "model.projection_dropout": (0.0, 0.1, 0.1),
    "model.layer_drop": (0.1, 0.0, 0.0),
    "pretrain.extractor_gradient": 1.0,
    # data
    "data.corpus": "librispeech",
    "data.train_parts": ["train-clean-100"],
    "data.valid_parts": ["dev-clean"],
    "data.subset": "10h",
    "data.subset_seed": 42,
    "data.vocabulary": "wav2vec2",
    "pretrain.min_seconds": 5.0,
    "pretrain.max_seconds": None,
    "pretrain.crop_seconds": (15.6, 10.0, 10.0),
    "pretrain.crop": ("random", "start", "start"),
    # pretraining
    "pretrain.quantizer.entries": 320,
    "pretrain.quantizer.codevector_dim": 256,
    "pretrain.quantizer.projection_dim": 256,
    "pretrain.quantizer.init": "uniform",
    "pretrain.quantizer.dropout": 0.0,
    "pretrain.masking.probability": (0.65, 0.05, 0.65),
    "pretrain.masking.length": 10,
    "pretrain.masking.min_spans": 2,
    "pretrain.masking.spans_drawn": ("utterance", "batch", "utterance"),
    "pretrain.contrastive.negatives": 100,
    "pretrain.contrastive.temperature": 0.1,
    "pretrain.contrastive.remove_collisions": True,
    "pretrain.diversity.weight": 0.1,
    "pretrain.diversity.form": ("entropy", "perplexity", "perplexity"),
    "pretrain.gumbel.start": 2.0,
    "pretrain.gumbel.floor": (0.5, 1.0, 0.5),
    "pretrain.gumbel.factor": (0.999995, 0.999999, None),
    "pretrain.updates": (2200, 714, 2200),
    "pretrain.batch_size": 16,
    "pretrain.accumulation": 4,
    "pretrain.epoch_end": ("carry", "short", "carry"),
    "pretrain.gradient": ("summed", "rescaled", "summed"),
    "pretrain.icsl.form": "signed",
    "pretrain.icsl.pairs": ("paper", "mean", "mean"),
    "pretrain.icsl.scaling": ("per_frame", "as_run", "per_frame"),
    "pretrain.optimizer.learning_rate": 1e-4,
    "pretrain.optimizer.betas": [0.9, 0.98],
    "pretrain.optimizer.eps": (1e-6, 1e-8, 1e-8),
    "pretrain.optimizer.weight_decay": 0.01,
    "pretrain.schedule.kind": "linear",
    "pretrain.schedule.warmup": (0.1, 100 / 2100, 0.1),
    "pretrain.schedule.length": (1.0, 2100 / 714, 1.0),
    "pretrain.schedule.counted_in": "updates",
    "pretrain.validation.redraw": (False, True, False),
    # fine-tuning
    "finetune.encoder": "facebook/wav2vec2-base",
    "finetune.train": ("head", "head", "transformer"),
    "finetune.encoder_mode": ("eval", "train", "eval"),
    "finetune.transformer_from": (0.0, 0.0, 0.3),
    "finetune.min_seconds": 0.0,
    "finetune.max_seconds": None,
    "finetune.input_length": ("utterance", "padded", "utterance"),
    "finetune.head_dropout": 0.0,
    "finetune.masking.probability": (0.0, 0.05, 0.65),
    "finetune.masking.length": 10,
    "finetune.masking.spans_drawn": ("utterance", "batch", "utterance"),
    "finetune.masking.channel_probability": (0.0, 0.0, 0.5),
    "finetune.masking.channel_length": 64,
    "finetune.rvq.codes": 256,
    "finetune.rvq.decay": 0.99,
    "finetune.rvq.ema": ("update", "micro_batch", "update"),
    "finetune.rvq.padding": (False, True, False),
    "finetune.rvq.kmeans_init": (False, False, True),
    "finetune.rvq.revive_below": (None, None, 2.0),
    "finetune.rvq.commitment": (0.0, 0.0, 0.25),
    "finetune.rvq.straight_through": (False, False, True),
    "finetune.updates": (1500, 1350, 1500),
    "finetune.batch_size": 8,
    "finetune.accumulation": 8,
    "finetune.epoch_end": ("carry", "short", "carry"),
    "finetune.gradient": ("summed", "averaged", "summed"),
    "finetune.optimizer.learning_rate": (1e-4, 1e-4, 5e-5),
    "finetune.optimizer.betas": ([0.9, 0.999], [0.9, 0.999], [0.9, 0.98]),
    "finetune.optimizer.eps": 1e-8,
    "finetune.optimizer.weight_decay": 0.01,
    "finetune.optimizer.clip_norm": (None, None, 1.0),
    "finetune.schedule.kind": "tri_stage",
    "finetune.schedule.warmup": (0.2, 0.2, 0.1),
    "finetune.schedule.hold": (0.2, 0.2, 0.4),
    "finetune.schedule.decay": (0.6, 0.6, 0.5),
    "finetune.schedule.decay_form": ("linear", "linear", "exponential"),
    "finetune.schedule.final_scale": (0.0, 0.0, 0.05),
    "finetune.schedule.counted_in": ("updates", "micro_batches", "updates"),
    "compute.precision": "float32",
}

# dotted path: {arm: (as-written, as-run, corrected)}
PRETRAIN_ARMS = {
    "quantizer.codebooks": {
        f"{prefix}icsl_{count}cb": (count, count, count)
        for count in CODEBOOKS
        for prefix in ("", "no_")
    },
    "icsl.weight": {f"no_icsl_{count}cb": (0.0, 0.0, 0.0) for count in CODEBOOKS}
    | {f"icsl_{count}cb": (0.1, 0.1, 0.1) for count in CODEBOOKS}
    | {"icsl_2cb": (0.1, 100.0, 0.1)},
    "icsl.divided_by_accumulation": {f"icsl_{count}cb": (True, True, True) for count in CODEBOOKS}
    | {"icsl_2cb": (True, False, True)},
    "optimizer.clip_norm": {f"no_icsl_{count}cb": (None, None, 1.0) for count in CODEBOOKS}
    | {f"icsl_{count}cb": (None, 1.0, 1.0) for count in CODEBOOKS},
}


def value(section, path):
    for name in path.split("."):
        section = getattr(section, name)
    return section


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_protocol_tables(protocol):
    recipe = load_recipe(protocol)
    column = PROTOCOLS.index(protocol)
    wanted = {path: row[column] if isinstance(row, tuple) else row for path, row in TABLE.items()}
    assert {path: value(recipe, path) for path in TABLE} == wanted


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_protocol_tables_by_arm(protocol):
    recipe = load_recipe(protocol)
    column = PROTOCOLS.index(protocol)
    for path, rows in PRETRAIN_ARMS.items():
        for arm, row in rows.items():
            assert value(recipe.pretrain_arm(arm), path) == row[column], (path, arm)
    levels = {arm: recipe.finetune_arm(arm).rvq.levels for arm in recipe.finetune.arms}
    more = dict.fromkeys(PLAIN_8 + ICSL_8 + TEN_MINUTES, 0) if protocol == "corrected" else {}
    more |= {arm: 4 for arm in more if "rvq_4" in arm}
    assert levels == {"no_rvq": 0} | {f"rvq_{n}": n for n in LEVELS} | more
    assert list(recipe.pretrain.arms) == PUBLISHED_ARMS + (
        ["icsl_sq_8cb", "icsl_8cb_x10", "icsl_8cb_x100"] if protocol == "corrected" else []
    )


def test_arms_that_ask_more_than_the_study_did():
    """Each differs from its own baseline in what it asks about alone."""
    recipe = load_recipe("corrected")
    plain = recipe.pretrain_arm("icsl_8cb").model_dump()
    for factor in (10, 100):
        heavier = recipe.pretrain_arm(f"icsl_8cb_x{factor}").model_dump()
        assert heavier["icsl"]["weight"] == pytest.approx(0.1 * factor)
        assert heavier == plain | {"icsl": plain["icsl"] | {"weight": heavier["icsl"]["weight"]}}
    for levels, arms in ((0, (PLAIN_8[0], ICSL_8[0])), (4, (PLAIN_8[1], ICSL_8[1]))):
        base = recipe.finetune_arm(f"rvq_{levels}" if levels else "no_rvq").model_dump()
        for arm, encoder in zip(arms, ("no_icsl_8cb", "icsl_8cb"), strict=True):
            section = recipe.finetune_arm(arm).model_dump()
            assert section == base | {"encoder": f"{encoder}/seed-{{seed}}"}
        few = recipe.finetune_arm(TEN_MINUTES[levels // 4]).model_dump()
        assert few == base | {"subset": "10min"}


def test_the_squared_arm_of_corrected_differs_in_its_form_alone():
    recipe = load_recipe("corrected")
    squared = recipe.pretrain_arm("icsl_sq_8cb").model_dump()
    assert squared["icsl"].pop("form") == "squared"
    plain = recipe.pretrain_arm("icsl_8cb").model_dump()
    assert plain["icsl"].pop("form") == "signed"
    assert squared == plain


def test_arms_of_corrected_are_controlled():
    """Arms of a pair differ in the ICSL weight and nothing else."""
    recipe = load_recipe("corrected")
    for count in CODEBOOKS:
        with_icsl = recipe.pretrain_arm(f"icsl_{count}cb").model_dump()
        without = recipe.pretrain_arm(f"no_icsl_{count}cb").model_dump()
        assert with_icsl["icsl"].pop("weight") == 0.1
        assert without["icsl"].pop("weight") == 0.0
        assert with_icsl == without
    arms = ["no_rvq", *(f"rvq_{n}" for n in LEVELS)]
    tuned = [recipe.finetune_arm(arm).model_dump() for arm in arms]
    for section in tuned:
        section["rvq"].pop("levels")
    assert all(a == b for a, b in pairwise(tuned))


# ------------------------------------------------------------------------ what follows from values


def test_as_run_pretraining_epochs():
    section = load_recipe("as-run").pretrain
    plan = plan_of(section, np.full(2641, 160000), 42)  # train utterances longer than 5 s
    assert plan.updates_per_epoch == 42
    assert plan.micro_batches_per_epoch == 166
    sizes = [len(batch) for batch in plan.update(42)]
    assert sizes == [16, 1]  # the last update of an epoch ends with a single utterance
    assert [len(batch) for batch in plan.update(43)] == [16] * 4
    assert section.updates == 17 * 42
    assert plan_of(section, np.full(2850, 160000), 42).updates_per_epoch == 45


def test_as_run_pretraining_schedule():
    section = load_recipe("as-run").pretrain
    rate = learning_rate_of(section, plan_of(section, np.full(2641, 160000), 42))
    assert (rate.length, rate.warmup_steps) == (2100, 100)
    assert rate(1) == 0.0
    assert rate(101) == pytest.approx(1e-4)
    assert rate(section.updates) == pytest.approx(6.9e-5, rel=0.01)  # stopped far from 0
    assert rate(2101) == 0.0
    gumbel = section.gumbel
    temperature = GumbelTemperature(gumbel.start, gumbel.floor, gumbel.factor, section.updates)
    assert temperature(section.updates) == pytest.approx(2.0, rel=1e-3)


def test_as_run_earlier_micro_batches_nearly_vanish():
    weights = micro_batch_weights(load_recipe("as-run").pretrain.gradient, [400] * 4, 4)
    assert [4 * weight for weight in weights] == pytest.approx([4e-11, 2e-8, 6e-6, 2.5e-3], rel=0.3)


def test_as_run_finetuning_epochs_and_schedule():
    section = load_recipe("as-run").finetune
    plan = plan_of(section, np.full(2850, 160000), 42)
    assert plan.updates_per_epoch == 45
    assert plan.micro_batches_per_epoch == 357
    assert len(plan.update(45)) == 5
    assert plan.micro_batches(section.updates) == 10710 == 30 * 357
    rate = learning_rate_of(section, plan)
    assert rate.length == 10710
    assert rate(1350) / 1e-4 == pytest.approx(0.63, abs=0.005)  # never leaves the warm-up
    assert all(rate(u) < rate(u + 1) for u in range(1, 1350))


@pytest.mark.parametrize("protocol", ["as-written", "corrected"])
def test_schedules_that_are_really_reached(protocol):
    recipe = load_recipe(protocol)
    rate = learning_rate_of(recipe.pretrain, plan_of(recipe.pretrain, np.full(2641, 160000), 1))
    assert (rate.length, rate.warmup_steps) == (2200, 220)
    assert max(map(rate, range(1, 2201))) == pytest.approx(1e-4)
    assert 0 < rate(2200) < 1e-7
    tuned = recipe.finetune
    peak = tuned.optimizer.learning_rate
    rate = learning_rate_of(tuned, plan_of(tuned, np.full(2850, 160000), 1))
    assert rate.length == 1500
    assert max(map(rate, range(1, 1501))) == peak
    last = {"as-written": 1 / 900, "corrected": 0.05}[protocol]  # linearly to 0; exponentially
    assert rate(1500) == pytest.approx(last * peak, rel=0.01)


def test_corrected_gumbel_temperature_is_geometric_to_its_end():
    section = load_recipe("corrected").pretrain
    gumbel = section.gumbel
    temperature = GumbelTemperature(gumbel.start, gumbel.floor, gumbel.factor, section.updates)
    assert temperature(1) == 2.0
    assert temperature(2200) == pytest.approx(0.5)
    assert temperature(1101) / temperature(1) == pytest.approx(
        temperature(2200) / temperature(1100), rel=1e-3
    )


# ------------------------------------------------------------------------------- the shipped files


def test_the_shipped_files():
    assert list(shipped_recipes()) == ["as-run", "as-written", "corrected", "demo", "mini", "smoke"]
    for name in shipped_recipes():
        assert load_recipe(name).name == name
        assert load_recipe(name).description


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(("size", "seeds"), [("mini", 5), ("smoke", 3)])
def test_sizes_lie_over_every_protocol(protocol, size, seeds):
    recipe = load_recipe(f"{protocol}+{size}")
    assert len(recipe.seeds) == seeds
    whole = load_recipe(protocol) if size == "mini" else load_recipe("as-written")
    assert list(recipe.pretrain.arms) == list(whole.pretrain.arms)
    assert list(recipe.finetune.arms) == list(whole.finetune.arms)
    assert recipe.data.corpus == "synthetic"
    # a size says nothing about the method
    method = load_recipe(protocol).pretrain
    for path in ("gradient", "masking", "icsl", "diversity", "gumbel", "schedule", "crop"):
        assert getattr(recipe.pretrain, path) == getattr(method, path), path
    assert recipe.pretrain.contrastive == method.contrastive


def test_demo_is_corrected_but_for_what_its_file_says():
    """The objective and the quantizers are the protocol's; masks are as long in milliseconds."""
    demo, mini = load_recipe("demo"), load_recipe("corrected+mini")
    assert (demo.seeds, demo.data.corpus) == ([1, 2, 3], "synthetic")
    for name in ("gradient", "icsl", "diversity", "gumbel", "schedule", "contrastive", "optimizer"):
        assert getattr(demo.pretrain, name) == getattr(mini.pretrain, name), name
    for name in ("gradient", "schedule"):
        assert getattr(demo.finetune, name) == getattr(mini.finetune, name), name
    rvq = mini.finetune.rvq.model_copy(update={"commitment": 0.0, "straight_through": False})
    assert demo.finetune.rvq == rvq, "nothing behind a head is trained"
    spans = [r.pretrain.masking.length * math.prod(r.model.conv_strides) for r in (demo, mini)]
    assert spans[0] == spans[1] == 3200
    assert {"no_icsl_8cb", "icsl_8cb"} == set(demo.pretrain.arms)
    assert set(demo.finetune.arms) == {"start", "no_rvq", "rvq_1", "rvq_4"}
    encoders = {arm: demo.finetune_arm(arm).encoder for arm in demo.finetune.arms}
    assert encoders.pop("start") == "no_icsl_8cb/seed-{seed}"
    assert set(encoders.values()) == {"finetune/start/seed-{seed}"}
    trained = {arm: demo.finetune_arm(arm).train for arm in demo.finetune.arms}
    assert (trained.pop("start"), set(trained.values())) == ("all", {"head"})


def leaves(tree, prefix=()):
    for name, item in tree.items():
        if isinstance(item, dict) and item:
            yield from leaves(item, (*prefix, name))
        else:
            yield (*prefix, name)


def value_below(recipe, path):
    """What a dotted path has in the recipe below; arms are their names, or one arm's override."""
    found = recipe.model_dump()
    for name in path:
        if not isinstance(found, dict) or name not in found:
            return None
        found = found[name]
    return list(found) if path[-1] == "arms" else found


BELOW = {
    "as-run": ["as-written"],
    "corrected": ["as-run"],
    "demo": ["corrected+mini"],
    "mini": PROTOCOLS,
    "smoke": [f"{protocol}+mini" for protocol in PROTOCOLS],
}


@pytest.mark.parametrize("name", list(BELOW))
def test_recipe_files_hold_differences_only(name):
    """Each line says something else than what lies below, on some protocol at least."""
    tree = yaml12.load(shipped_recipes()[name].read_text(encoding="utf-8"))
    below = [load_recipe(spec) for spec in BELOW[name]]
    idle = [
        ".".join(path)
        for path in leaves(tree)
        if path[0] not in ("extends", "protocol", "description")
        and all(value_below(recipe, path) == item_at(tree, path) for recipe in below)
    ]
    assert idle == []


def item_at(tree, path):
    for name in path:
        tree = tree[name]
    return tree


def test_plans_of_whole_epochs_lose_no_utterance():
    plan = Plan(2641, 16, 4, 42, "short")
    seen = sorted(i for update in range(1, 43) for batch in plan.update(update) for i in batch)
    assert seen == list(range(2641))


# LibriSpeech by its own lists: 2850 utterances of train-clean-100 are 10 h, dev-clean's 2703 are
# 5.39 h. Seconds of audio an update trains on, and one validation takes at most.
TRAIN, VALID = 36000 / 2850, 5.39 * 3600 / 2703
EXTRACTOR = 0.35
"""Share of the base's forward pass that is the convolutions' (2.45 of 7.0 GMAC a second)."""


@pytest.mark.parametrize("name", ["as-written", "corrected"])
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_validation_takes_less_than_a_tenth_of_a_paper_size_run(name, stage):
    """In units of the forward pass of a second; a backward pass is two of what is trained."""
    section = getattr(load_recipe(name), stage)
    utterances = section.batch_size * section.accumulation
    if stage == "pretrain":  # mean of those longer than 5 s, cropped
        train = min(section.crop_seconds, 12.9) * utterances * 3
        valid = min(section.crop_seconds, 9.5)
        longer = 0.6  # of dev-clean's utterances
    elif section.train == "head":  # on kept features: quantizers, which the training moves too
        train, valid, longer = TRAIN * utterances * 1.2, VALID, 1.0
    else:
        waits = section.transformer_from
        train = TRAIN * utterances * (waits + (1 - waits) * (EXTRACTOR + 3 * (1 - EXTRACTOR)))
        valid, longer = VALID, 1.0
    count = min(round(2703 * longer), section.validation.max_utterances or 2703)
    validations = math.ceil(section.updates / section.validation.every)
    share = validations * count * valid / (validations * count * valid + section.updates * train)
    assert 0.03 < share < 0.1


def test_as_run_validates_each_epoch_on_all_as_the_study_did():
    for section in (load_recipe("as-run").pretrain, load_recipe("as-run").finetune):
        assert (section.validation.every, section.validation.max_utterances) == ("epoch", None)


@pytest.mark.parametrize("protocol", ["as-run", "as-written", "corrected"])
def test_sizes_say_themselves_when_they_validate(protocol):
    for size, every, most in (("mini", (20, 30), 48), ("smoke", (5, 4), 8)):
        recipe = load_recipe(f"{protocol}+{size}")
        sections = (recipe.pretrain.validation, recipe.finetune.validation)
        assert tuple(section.every for section in sections) == every
        assert [section.max_utterances for section in sections] == [most, most]
