"""The schema itself: strictness, JSON Schema, hashes, and no key that nothing reads."""

import inspect
import math
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import ValidationError

from reproduce.data.corpora import synthetic
from reproduce.errors import RecipeError
from reproduce.model import encoder
from reproduce.model.encoder import Encoder, EncoderConfig
from reproduce.model.precision import CONVOLUTIONS, PRODUCTS
from reproduce.recipe import load_recipe, schema, shipped_recipes, yaml12
from reproduce.recipe.dump import as_yaml, json_schema
from reproduce.recipe.messages import known_paths
from reproduce.recipe.schema import Finetune, Recipe, Section, duration_seconds, settings_sha256
from reproduce.records import RunRecord, WorkFolder
from reproduce.stages.finetune import finetune
from reproduce.stages.prepare import prepare
from reproduce.stages.pretrain import pretrain
from reproduce.tasks.context import open_context
from reproduce.tasks.wiring import autocast, compile_encoder
from reproduce.training import distributed

# ------------------------------------------------------------------------------------- the sections


def test_as_written_is_the_defaults():
    assert load_recipe("as-written") == Recipe(
        name="as-written", description=load_recipe("as-written").description
    )


def test_sections_are_strict_and_frozen():
    with pytest.raises(ValidationError, match="extra_forbidden"):
        schema.Optimizer(rate=1.0)
    with pytest.raises(ValidationError, match="float_type"):
        schema.Optimizer(learning_rate="1e-4")
    with pytest.raises(ValidationError, match="finite_number"):
        schema.Optimizer(learning_rate=math.inf)
    with pytest.raises(ValidationError, match="frozen"):
        schema.Optimizer().eps = 1.0


def test_defaults_are_not_shared():
    one, other = Recipe(), Recipe()
    one.pretrain.arms["mine"] = {}
    one.data.train_parts.append("more")
    assert "mine" not in other.pretrain.arms
    assert other.data.train_parts == ["train-clean-100"]


def test_overrides_are_validated_and_leave_the_section_alone():
    section = Finetune()
    changed = section.with_overrides({"rvq.levels": 4, "optimizer.eps": 1e-3})
    assert (changed.rvq.levels, changed.optimizer.eps) == (4, 1e-3)
    assert section == Finetune()
    for wrong in ({"rvq.level": 4}, {"rvq.levels": "4"}, {"rvq": 3}):
        with pytest.raises(ValidationError):
            section.with_overrides(wrong)


def test_settings_hold_what_decides_numbers_and_nothing_else():
    recipe = load_recipe("as-run")
    digest = settings_sha256(recipe.settings("pretrain", "icsl_8cb"))
    for same in (
        ["data.root=/somewhere"],
        ["data.jobs=3", "compute.threads=2", "compute.device=cpu"],
        ["compute.processes=4", "cluster.nodes=2", "cluster.slurm_partition=gpu"],
        ["pretrain.checkpoint_every=7", "seeds=[1, 2]", "name=x"],
        ["pretrain.arms.icsl_2cb.icsl.weight=3", "finetune.updates=3"],
    ):
        assert settings_sha256(load_recipe("as-run", same).settings("pretrain", "icsl_8cb")) == (
            digest
        )
    for other in (
        ["pretrain.updates=7"],
        ["model.dropout=0.2"],
        ["data.subset=1h"],
        ["compute.precision=bf16"],
        ["pretrain.arms.icsl_8cb.icsl.weight=3"],
    ):
        assert settings_sha256(load_recipe("as-run", other).settings("pretrain", "icsl_8cb")) != (
            digest
        )
    assert settings_sha256({"a": 1, "b": 2.0}) == settings_sha256({"b": 2.0, "a": 1})


# -------------------------------------------------------------------------------------- JSON Schema


def violations(value, rule, root, path="$"):
    """The part of JSON Schema (2020-12) that ours uses, the slow obvious way."""
    if "$ref" in rule:
        name = rule["$ref"].removeprefix("#/$defs/")
        yield from violations(value, root["$defs"][name], root, path)
    if "anyOf" in rule:
        branches = [list(violations(value, branch, root, path)) for branch in rule["anyOf"]]
        if all(branches):
            yield f"{path}: none of anyOf"
    kinds = {
        "object": dict, "array": list, "string": str, "boolean": bool, "null": type(None),
        "integer": int, "number": (int, float),
    }  # fmt: skip
    if "type" in rule:
        right = isinstance(value, kinds[rule["type"]])
        if isinstance(value, bool) and rule["type"] in ("integer", "number"):
            right = False
        if not right:
            yield f"{path}: not {rule['type']}"
            return
    if "enum" in rule and value not in rule["enum"]:
        yield f"{path}: not in enum"
    if "const" in rule and value != rule["const"]:
        yield f"{path}: not const"
    if isinstance(value, int | float) and not isinstance(value, bool):
        if value < rule.get("minimum", -math.inf) or value > rule.get("maximum", math.inf):
            yield f"{path}: out of range"
        if value <= rule.get("exclusiveMinimum", -math.inf):
            yield f"{path}: not above {rule['exclusiveMinimum']}"
    if isinstance(value, str) and not re.search(rule.get("pattern", ""), value):
        yield f"{path}: not {rule['pattern']}"
    if isinstance(value, list):
        if not rule.get("minItems", 0) <= len(value) <= rule.get("maxItems", math.inf):
            yield f"{path}: length {len(value)}"
        for index, item in enumerate(value):
            yield from violations(item, rule.get("items", {}), root, f"{path}[{index}]")
    if isinstance(value, dict):
        for name, item in value.items():
            properties = rule.get("properties", {})
            inner = properties.get(name, rule.get("additionalProperties", {}))
            if inner is False:
                yield f"{path}.{name}: unknown"
            else:
                yield from violations(item, inner, root, f"{path}.{name}")


HANDLED = {
    "$schema", "$defs", "$ref", "anyOf", "type", "enum", "const", "minimum", "maximum",
    "exclusiveMinimum", "pattern", "minItems", "maxItems", "items", "properties",
    "additionalProperties", "title", "description", "default", "source",
}  # fmt: skip


def keywords(rule):
    for name, value in rule.items():
        yield name
        if name in ("properties", "$defs"):
            for inner in value.values():
                yield from keywords(inner)
        elif name == "anyOf":
            for inner in value:
                yield from keywords(inner)
        elif name in ("items", "additionalProperties") and isinstance(value, dict):
            yield from keywords(value)


def test_json_schema_uses_known_keywords_and_resolvable_references():
    root = json_schema()
    assert set(keywords(root)) <= HANDLED
    text = str(root)
    assert all(name in root["$defs"] for name in re.findall(r"#/\$defs/(\w+)", text))


@pytest.mark.parametrize("name", list(shipped_recipes()))
def test_json_schema_accepts_shipped_recipes_and_what_show_prints(name):
    root = json_schema()
    written = yaml12.load(shipped_recipes()[name].read_text(encoding="utf-8"))
    assert list(violations(written, root, root)) == []
    shown = yaml.safe_load(as_yaml(load_recipe(name)))
    assert list(violations(shown, root, root)) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("pretrain: {update: 3}", "$.pretrain.update: unknown"),
        ("seeds: 3", "$.seeds: not array"),
        ("seeds: []", "$.seeds: length 0"),
        ("pretrain: {updates: 0}", "$.pretrain.updates: out of range"),
        ("pretrain: {optimizer: {learning_rate: 0}}", "not above 0"),
        ("compute: {precision: fp16}", "$.compute.precision: not in enum"),
        ("pretrain: {validation: {every: often}}", "$.pretrain.validation.every: none of anyOf"),
        ("pretrain: {arms: 3}", "$.pretrain.arms: none of anyOf"),
        ("pretrain: null", "$.pretrain: not object"),
    ],
)
def test_json_schema_rejects(text, found):
    root = json_schema()
    assert any(found in item for item in violations(yaml.safe_load(text), root, root))


def test_json_schema_describes_every_key_with_its_source():
    root = json_schema()
    for name, definition in root["$defs"].items():
        for key, rule in definition["properties"].items():
            assert rule.get("description"), (name, key)
            assert rule.get("source"), (name, key)


# --------------------------------------------------------------------------------- no dead keys

TINY = [
    "seeds=[1]",
    "data.synthetic={hours: 0.008, valid_hours: 0.003, speakers: 1, valid_speakers: 1}",
    "data.synthetic.max_seconds=4",
    "data.jobs=1",
    "model={conv_channels: [8, 8, 8, 8, 8, 8, 8], width: 16, layers: 1, heads: 2}",
    "model.feed_forward=16",
    "compute={threads: 1, device: cpu}",
    "pretrain.quantizer={entries: 4, codevector_dim: 16, projection_dim: 16}",
    "pretrain.arms=[icsl_2cb]",
    "pretrain.icsl.scaling=as_run",
    "pretrain.updates=2",
    "finetune.updates=2",
    "finetune.transformer_from=0.5",
    "finetune.encoder=icsl_2cb/seed-1",
    "finetune.rvq={codes: 4}",
    "finetune.arms=[rvq_2]",
    "finetune.arms.frozen={train: head, transformer_from: 0.0, rvq.commitment: 0.0}",
    "finetune.arms.frozen={encoder_mode: train}",
    "finetune.arms.kept={train: head, transformer_from: 0.0, rvq.commitment: 0.0}",
    "finetune.arms.kept={masking.probability: 0.0, masking.channel_probability: 0.0}",
]
# read from the whole section at once; the tests below see to them
AS_A_WHOLE = ("model.", "data.synthetic.", "cluster.")
# read by the command line, which hands the stages arms, seeds and ranks
COMMAND_LINE = {
    "name", "description", "seeds", "compute.device", "compute.processes", "pretrain.arms",
    "finetune.arms",
}  # fmt: skip


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """prepare, pretrain, finetune at toy size; which keys the code read in each stage."""
    recipe = load_recipe("smoke", TINY)
    work = WorkFolder(tmp_path_factory.mktemp("chain"))
    read = {"prepare": set(), "pretrain": set(), "finetune": set()}
    reading = set()

    def getattribute(self, name):
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("reproduce.") and not caller.startswith("reproduce.recipe"):
            reading.add((type(self), name))
        return object.__getattribute__(self, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reproduce.stages.prepare.save_recipe", lambda *_: None)
        patch.setattr("reproduce.tasks.context.save_recipe", lambda *_: None)
        patch.setattr(Section, "__getattribute__", getattribute, raising=False)
        for stage in read:
            reading = read[stage]
            ranks = distributed.start(recipe.compute.device)
            if stage == "prepare":
                prepare(recipe, work)
            elif stage == "pretrain":
                pretrain(recipe, work, ranks, list(recipe.pretrain.arms), recipe.seeds)
            else:
                finetune(recipe, work, ranks, list(recipe.finetune.arms), recipe.seeds)
    return recipe, work, read


def owner(path):
    """The section class of a dotted path, and its last name."""
    model = Recipe
    *parents, last = path.split(".")
    for name in parents:
        model = model.model_fields[name].annotation
    return model, last


def test_every_key_is_read_by_the_code_that_it_speaks_to(chain):
    _, _, read = chain
    everywhere = set().union(*read.values())
    dead = []
    for path in known_paths(Recipe):
        model, name = owner(path)
        info = model.model_fields[name].annotation
        is_section = isinstance(info, type) and issubclass(info, Section)
        if is_section or path in COMMAND_LINE or path.startswith(AS_A_WHOLE):
            continue
        stage = path.partition(".")[0]
        found = read.get(stage, everywhere)
        if not any(issubclass(model, base) and name == key for base, key in found):
            dead.append(path)
    assert dead == []


def test_every_model_key_reaches_the_encoder():
    fields = set(EncoderConfig.__dataclass_fields__)
    assert set(schema.Model.model_fields) == fields - {"extractor_gradient", "normalized"}
    source = Path(encoder.__file__).read_text(encoding="utf-8")
    forward = source[source.index("class Encoder(") :]
    assert [name for name in fields if f"config.{name}" not in forward] == []


def test_every_synthetic_key_is_an_option_of_that_corpus():
    assert set(inspect.signature(synthetic.utterances).parameters) == set(
        schema.Synthetic.model_fields
    )


def test_the_chain_ran_what_the_recipe_says(chain):
    recipe, work, _ = chain
    for stage, arms in (("pretrain", recipe.pretrain.arms), ("finetune", recipe.finetune.arms)):
        for arm in arms:
            record = RunRecord.read(work.run(stage, arm, 1).record)
            assert (record.status, record.precision) == ("finished", "float32")
            assert record.recipe_sha256 == settings_sha256(record.settings)


@pytest.fixture
def tf32_put_back():
    switches = (PRODUCTS, *CONVOLUTIONS)
    before = [switch.fp32_precision for switch in switches]
    yield
    for switch, value in zip(switches, before, strict=True):
        switch.fp32_precision = value


@pytest.mark.usefixtures("tf32_put_back")
@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_precision_reaches_the_arithmetic(chain, precision):
    recipe, work, _ = chain
    changed = recipe.model_copy(
        update={"compute": recipe.compute.model_copy(update={"precision": precision})}
    )
    context = open_context(changed, work, distributed.start("cpu"), "pretrain")
    with autocast(context):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    expected = "ieee" if precision == "float32" else "tf32"
    assert {switch.fp32_precision for switch in (PRODUCTS, *CONVOLUTIONS)} == {expected}
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("wanted", [False, True])
def test_compile_reaches_the_encoder(chain, wanted, monkeypatch):
    recipe, work, _ = chain
    changed = recipe.model_copy(
        update={"compute": recipe.compute.model_copy(update={"compile": wanted})}
    )
    context = open_context(changed, work, distributed.start("cpu"), "pretrain")
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, **_: compiled.append(f) or f)
    compile_encoder(context, Encoder(EncoderConfig(**recipe.model.model_dump())))
    assert bool(compiled) == wanted


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30.0), ("10min", 600.0), ("1.5h", 5400.0), ("0.5min", 30.0)]
)
def test_durations(text, seconds):
    assert load_recipe("mini", [f"pretrain.checkpoint_every={text}"])
    assert duration_seconds(text) == seconds


@pytest.mark.parametrize("text", ["soon", "10 min", "min", "1d", "-5s", "0"])
def test_what_is_no_duration(text):
    with pytest.raises(RecipeError, match=r"pretrain\.checkpoint_every"):
        load_recipe("mini", [f"pretrain.checkpoint_every={text}"])
