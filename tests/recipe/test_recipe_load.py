"""Layers, --set, and what a user is told about a recipe that isn't one."""

from pathlib import Path

import pytest
import yaml

from reproduce.errors import RecipeError, UsageError
from reproduce.recipe import Recipe, load_recipe, shipped_recipes
from reproduce.recipe.dump import as_yaml
from reproduce.recipe.load import resolve


@pytest.fixture
def recipe_file(tmp_path, monkeypatch):
    """Write a recipe file into the working folder."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str) -> str:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text, encoding="utf-8")
        return name

    return write


def problems(spec: str, *sets: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(spec, sets)
    assert caught.value.exit_code == 2
    return caught.value.problems


# ------------------------------------------------------------------------------------------ layers


def test_later_layers_lie_over_earlier_ones(recipe_file):
    recipe_file("mine.yaml", "seeds: [7]\npretrain: {updates: 11}\n")
    recipe = load_recipe("corrected+mini+./mine.yaml")
    assert recipe.name == "corrected+mini+mine"
    assert recipe.seeds == [7]
    assert recipe.pretrain.updates == 11  # mine
    assert recipe.pretrain.crop_seconds == 4.0  # mini
    assert recipe.pretrain.optimizer.clip_norm == 1.0  # corrected
    assert recipe.model.layer_drop == 0.0  # as-run, which corrected extends
    assert recipe.pretrain.min_seconds == 2.0
    assert load_recipe("corrected").pretrain.min_seconds == 5.0  # as-written


def test_extends_is_laid_below_and_a_layer_once(recipe_file):
    recipe_file("a.yaml", "extends: as-run\nseeds: [1]\n")
    recipe_file("b.yaml", "extends: ./a.yaml\npretrain: {updates: 5}\n")
    _, origin = resolve("b.yaml")
    assert origin["seeds"] == "./a.yaml"
    assert origin["pretrain.updates"] == "b.yaml"
    assert origin["pretrain.crop"] == "as-run"
    assert load_recipe("as-run+corrected").model_dump(exclude={"name"}) == load_recipe(
        "corrected"
    ).model_dump(exclude={"name"})


def test_protocol_is_laid_below_a_size_only_where_nothing_else_is(recipe_file):
    alone = load_recipe("mini").model_dump(exclude={"name"})
    assert alone == load_recipe("corrected+mini").model_dump(exclude={"name"})
    assert load_recipe("as-run+mini").pretrain.gradient == "rescaled"
    recipe_file("mine.yaml", "extends: mini\nseeds: [3]\n")
    through = load_recipe("mine.yaml").model_dump(exclude={"name", "seeds"})
    assert through == load_recipe("mini").model_dump(exclude={"name", "seeds"})


def test_extends_is_relative_to_the_file_that_says_it(recipe_file):
    recipe_file("sub/base.yaml", "seeds: [5]\n")
    recipe_file("sub/top.yaml", "extends: base.yaml\n")
    assert load_recipe("sub/top.yaml").seeds == [5]


@pytest.mark.parametrize("spec", ["as-run+as-run", "mini+as-run", "mini+corrected", "smoke+mini"])
def test_a_layer_that_lies_below_already_is_no_later_layer(spec):
    with pytest.raises(UsageError, match=r"lies below .* already"):
        load_recipe(spec)


def test_the_base_can_only_come_first():
    with pytest.raises(UsageError, match="as-written lies below mini already"):
        load_recipe("mini+as-written")
    assert load_recipe("as-written+mini").pretrain.gradient == "summed"


def test_a_recipe_standing_on_itself(recipe_file):
    recipe_file("a.yaml", "extends: b.yaml\n")
    recipe_file("b.yaml", "extends: a.yaml\n")
    assert problems("a.yaml") == ["extends: a.yaml stands on itself"]


def test_names_and_paths(recipe_file):
    recipe_file("noextension", "seeds: [1]\n")
    recipe_file("p+q/r+s.yaml", "seeds: [2]\n")
    assert load_recipe(str(Path("noextension").resolve())).name == "noextension"
    assert load_recipe("p+q/r+s.yaml").name == "r+s"
    assert load_recipe("as-run+p+q/r+s.yaml").seeds == [2]
    recipe_file("named.yaml", "name: évaluation\n")
    assert load_recipe("named.yaml").name == "évaluation"


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("as-runn", "did you mean as-run?"),
        ("corrected+minni", "did you mean mini?"),
        ("./nope.yaml", "shipped recipes: as-run, as-written, corrected, demo, mini, smoke"),
        ("as-run+", "join names by +"),
        ("", "join names by +"),
    ],
)
def test_no_such_recipe(spec, hint):
    with pytest.raises(UsageError) as caught:
        load_recipe(spec)
    assert hint in str(caught.value)


def test_a_mistyped_extends_names_the_file_that_says_it(recipe_file):
    recipe_file("mine.yaml", "extends: as-runn\n")
    with pytest.raises(UsageError, match=r"mine.yaml, extends: no recipe 'as-runn'"):
        load_recipe("mine.yaml")
    recipe_file("list.yaml", "extends: [as-run]\n")
    assert problems("list.yaml") == ["extends: should be a recipe's name, found ['as-run']"]


# ------------------------------------------------------------------------------------------- --set


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("pretrain.updates=100", "pretrain.updates", 100),
        ("pretrain.optimizer.learning_rate=1e-4", "pretrain.optimizer.learning_rate", 1e-4),
        ("pretrain.optimizer.learning_rate=5E-05", "pretrain.optimizer.learning_rate", 5e-5),
        ("pretrain.optimizer.eps=1.e-8", "pretrain.optimizer.eps", 1e-8),
        ("pretrain.optimizer.learning_rate=1", "pretrain.optimizer.learning_rate", 1.0),
        ("seeds=[1, 2, 3]", "seeds", [1, 2, 3]),
        ("pretrain.optimizer.clip_norm=null", "pretrain.optimizer.clip_norm", None),
        ("pretrain.optimizer={eps: 1e-3}", "pretrain.optimizer.eps", 1e-3),
        ("pretrain.validation.every=epoch", "pretrain.validation.every", "epoch"),
        ("finetune.keep_features=no", "finetune.keep_features", "no"),
        ("data.root=/a=b/c", "data.root", "/a=b/c"),
        ("description=", "description", None),
    ],
)
def test_set(text, path, value):
    if value is None and path == "description":
        assert problems("as-run", text) == [
            "description: should be text, in quotes, found nothing (from --set description=)"
        ]
        return
    found = load_recipe("as-run", [text])
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


def test_set_lies_over_every_layer_and_the_last_one_counts():
    assert load_recipe("as-run", ["seeds=[1]", "seeds=[2]"]).seeds == [2]


def test_set_reaches_into_arms():
    recipe = load_recipe(
        "as-run",
        [
            "pretrain.arms.icsl_8cb.icsl.weight=0.5",
            "pretrain.arms.icsl_8cb.optimizer={eps: 1e-3}",
            "finetune.arms.rvq_3.rvq.levels=3",
        ],
    )
    arm = recipe.pretrain_arm("icsl_8cb")
    assert (arm.icsl.weight, arm.optimizer.eps, arm.optimizer.clip_norm) == (0.5, 1e-3, 1.0)
    assert arm.quantizer.codebooks == 8
    assert recipe.finetune_arm("rvq_3").rvq.levels == 3


@pytest.mark.parametrize("text", ["pretrain.updates", "=3", "a..b=1", ".a=1", " =1"])
def test_set_that_is_not_key_value(text):
    with pytest.raises(UsageError, match="isn't key=value") as caught:
        load_recipe("as-run", [text])
    assert "as in --set pretrain.updates=100" in str(caught.value)


@pytest.mark.parametrize("key", ["extends", "protocol"])
def test_layers_are_not_set(key):
    with pytest.raises(UsageError, match=f"{key} is for recipe files"):
        load_recipe("as-run", [f"{key}=mini"])


def test_an_unknown_section_names_its_layer():
    assert problems("as-run", "foo.bar=1") == ["foo: unknown key (from --set foo.bar=1)"]


def test_one_e_minus_four_is_a_number_for_our_loader_only(recipe_file):
    recipe_file("mine.yaml", "pretrain: {optimizer: {learning_rate: 1e-4, eps: -0}}\n")
    assert "eps" in problems("mine.yaml")[0]  # -0 is not above 0: learning_rate was fine
    assert yaml.safe_load("1e-4") == "1e-4"


# -------------------------------------------------------------------------------------------- arms


def test_arms_as_a_mapping_add_to_those_below(recipe_file):
    recipe_file(
        "mine.yaml",
        """
        extends: as-run
        pretrain:
          arms:
            icsl_2cb: {icsl: {weight: 5.0}}
            mine: {quantizer.codebooks: 1}
        """,
    )
    arms = load_recipe("mine.yaml").pretrain.arms
    assert list(arms)[-1] == "mine"
    assert len(arms) == 9
    assert arms["icsl_2cb"] == {
        "quantizer.codebooks": 2,
        "icsl.weight": 5.0,
        "icsl.divided_by_accumulation": False,
        "optimizer.clip_norm": 1.0,
    }


def test_arms_null_removes_and_a_list_selects_in_its_order(recipe_file):
    recipe_file("null.yaml", "pretrain: {arms: {icsl_2cb: null, no_icsl_16cb: null}}\n")
    assert list(load_recipe("null.yaml").pretrain.arms) == [
        "no_icsl_2cb", "no_icsl_4cb", "icsl_4cb", "no_icsl_8cb", "icsl_8cb", "icsl_16cb"
    ]  # fmt: skip
    recipe_file("list.yaml", "finetune: {arms: [rvq_4, no_rvq]}\n")
    assert list(load_recipe("as-run+list.yaml").finetune.arms) == ["rvq_4", "no_rvq"]


def test_arms_that_are_none(recipe_file):
    assert problems("as-run", "pretrain.arms=[icsl_8cbb, 3]") == [
        "pretrain.arms: no arm 'icsl_8cbb'; did you mean icsl_8cb? "
        "(from --set pretrain.arms=[icsl_8cbb, 3])",
        "pretrain.arms: no arm 3 (from --set pretrain.arms=[icsl_8cbb, 3])",
    ]
    assert problems("as-run", "pretrain.arms=[]") == ["pretrain.arms: at least one arm is needed"]
    assert (
        "a mapping of arms or a list of their names, found 3"
        in problems("as-run", "pretrain.arms=3")[0]
    )
    assert (
        "should be a mapping of keys, found 3" in problems("as-run", "pretrain.arms.icsl_8cb=3")[0]
    )
    assert (
        "no arm to remove; did you mean icsl_8cb?"
        in problems("as-run", "pretrain.arms={icsl_8cbb: null}")[0]
    )
    assert (
        "pretrain.arms.a/b: an arm's name has letters, digits, _ and - only"
        in problems("as-run", "pretrain.arms={a/b: {icsl.weight: 1.0}}")[0]
    )
    recipe_file("numbers.yaml", "pretrain:\n  arms:\n    1: {quantizer.codebooks: 2}\n")
    assert "pretrain.arms.1: a name is text, found 1" in problems("numbers.yaml")[0]


# ---------------------------------------------------------------------------------------- problems


def test_every_problem_at_once_with_path_nearest_name_and_layer(recipe_file):
    recipe_file(
        "mine.yaml",
        """
        seeds: 3
        taste: sweet
        pretrain:
          update: 5
          arms:
            icsl_8cb: {icsl.wieght: 1.0, quantizer.codebooks: 3}
        finetune:
          lerning_rate: 1.0
          batch_size: '16'
          optimizer: {learning_rate: '1e-4', betas: [0.9, x]}
          rvq: 5
          train: heads
          learning_rate: 1.0
        """,
    )
    assert problems("as-run+mine.yaml", "model.heads=5", "compute.precision=fp16") == [
        "seeds: should be a list in brackets, found 3 (from mine.yaml)",
        "pretrain.update: unknown key; did you mean pretrain.updates? (from mine.yaml)",
        "finetune.batch_size: should be a whole number, found '16' (from mine.yaml)",
        "finetune.optimizer.learning_rate: should be a number, found '1e-4' (from mine.yaml)",
        "finetune.optimizer.betas.1: should be a number, found 'x' (from mine.yaml)",
        "finetune.train: should be 'head', 'transformer' or 'all', found 'heads' (from mine.yaml)",
        "finetune.rvq: should be a section with keys, found 5 (from mine.yaml)",
        "finetune.lerning_rate: unknown key; did you mean finetune.optimizer.learning_rate? "
        "(from mine.yaml)",
        "finetune.learning_rate: unknown key; did you mean finetune.optimizer.learning_rate? "
        "(from mine.yaml)",
        "compute.precision: should be 'float32', 'tf32' or 'bf16', found 'fp16' "
        "(from --set compute.precision=fp16)",
        "taste: unknown key (from mine.yaml)",
        "pretrain.arms.icsl_8cb.icsl.wieght: unknown key; did you mean icsl.weight? "
        "(from mine.yaml)",
        "model.heads: 5 does not divide width 768 (from --set model.heads=5)",
        "pretrain.arms.icsl_8cb.quantizer.codebooks: 3 does not divide quantizer.codevector_dim "
        "256 (from mine.yaml)",
    ]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: the key 'a' twice"),
        ("pretrain:\n  updates: 3\n  updates: 4\n", "line 3: the key 'updates' twice"),
        ("pretrain:\n\tupdates: 3\n", "line 2: a tab, where YAML wants spaces"),
        ("seeds: [1, 2\n", "line 2: while parsing a flow sequence"),
        ("a: 1\n---\nb: 2\n", "line 2: expected a single document"),
        ("name: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        ("- a\n- b\n", "a recipe is a mapping, found list"),
        ("hello\n", "a recipe is a mapping, found str"),
        ("name: \x00\n", "not YAML: unacceptable character"),
    ],
)
def test_files_that_are_no_recipe(recipe_file, text, found):
    recipe_file("bad.yaml", text)
    (problem,) = problems("bad.yaml")
    assert problem.startswith(found) or found in problem


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("1: 2\n", "1: a key is text, found 1; put it in quotes (from bad.yaml)"),
        ("pretrain: {true: 3}\n", "pretrain.True: a key is text, found True; put it in quotes"),
        ("pretrain:\n", "pretrain: empty; give it keys or leave it out (from bad.yaml)"),
        ("finetune: {arms: }\n", "finetune.arms: empty; give it keys or leave it out"),
        ("pretrain: 3\n", "pretrain: should be a section with keys, found 3 (from bad.yaml)"),
        (
            "pretrain: {optimizer.clip_norm: 1.0}\n",
            "pretrain.optimizer.clip_norm: a dotted key is for arms; here write "
            "optimizer: {clip_norm: ...} (from bad.yaml)",
        ),
        (
            "pretrain: {updates: {a: 1}}\n",
            "pretrain.updates: should be a whole number, found a map",
        ),
        ("pretrain: {updates: 1.5}\n", "pretrain.updates: should be a whole number, found 1.5"),
        ("pretrain: {updates: true}\n", "pretrain.updates: should be a whole number, found True"),
        ("pretrain: {updates: 0}\n", "pretrain.updates: should be greater than or equal to 1, fou"),
        ("pretrain: {updates: -1}\n", "pretrain.updates: should be greater than or equal to 1"),
        ("name: 123\n", "name: should be text, in quotes, found 123 (from bad.yaml)"),
        ("name: ../x\n", "name: names the work folder; '../x' can't (from bad.yaml)"),
        ("seeds: []\n", "seeds: list should have at least 1 item after validation, not 0"),
        ("seeds: [-1]\n", "seeds.0: should be greater than or equal to 0, found -1"),
        ("seeds: [1, a]\n", "seeds.1: should be a whole number, found 'a' (from bad.yaml)"),
        ("seeds: {0: 1}\n", "seeds: should be a list in brackets, found a mapping"),
        (
            "pretrain: {optimizer: {learning_rate: .inf}}\n",
            "pretrain.optimizer.learning_rate: should be a finite number, found inf",
        ),
        (
            "pretrain: {optimizer: {learning_rate: .nan}}\n",
            "pretrain.optimizer.learning_rate: should be a finite number, found nan",
        ),
        (
            "pretrain: {validation: {every: epochs}}\n",
            "pretrain.validation.every: should be a whole number or 'epoch', found 'epochs'",
        ),
        ("model: {conv_bias: no}\n", "model.conv_bias: should be true or false, found 'no'"),
        ("finetune: {validation: {redraw: true}}\n", "finetune.validation.redraw: unknown key"),
        (
            "pretrain: {masking: {channel_probability: 0.5}}\n",
            "pretrain.masking.channel_probability: unknown key",
        ),
    ],
)
def test_values_that_do_not_fit(recipe_file, text, found):
    recipe_file("bad.yaml", text)
    (problem,) = problems("bad.yaml")
    assert problem.startswith(found)


def test_a_file_that_cannot_be_read(recipe_file):
    recipe_file("latin.yaml", "")
    Path("latin.yaml").write_bytes("description: Größe\n".encode("latin-1"))
    with pytest.raises(UsageError, match=r"latin.yaml: not UTF-8 text: byte 15"):
        load_recipe("latin.yaml")


def test_an_empty_file_is_as_written(recipe_file):
    recipe_file("empty.yaml", "# nothing\n")
    assert load_recipe("empty.yaml") == Recipe(name="empty")


# --------------------------------------------------------------------------------- show and reload


@pytest.mark.parametrize(
    ("spec", "sets"),
    [
        *((name, ()) for name in shipped_recipes()),
        ("as-run+mini", ()),
        ("corrected+smoke", ("data.subset=1h", "data.test_parts=[test-clean]")),
        ("as-run", ("pretrain.arms=[icsl_8cb, no_icsl_2cb]", "finetune.arms=[rvq_4]")),
        ("as-run", ("pretrain.arms.icsl_8cb=null", "pretrain.arms.icsl_8cb.icsl.weight=1")),
        ("as-run", ("description='a: \"b\" # c\n\nd'", "name=no", "data.root='2024-01-01'")),
        ("as-run", ("pretrain.optimizer.learning_rate=1.2345678901234567e-7",)),
    ],
)
def test_show_then_reload_is_the_same_recipe(tmp_path, spec, sets):
    recipe, origin = resolve(spec, sets)
    file = tmp_path / "shown.yaml"
    for text in (as_yaml(recipe), as_yaml(recipe, origin)):
        file.write_text(text, encoding="utf-8")
        again = load_recipe(str(file))
        assert again == recipe
        assert list(again.pretrain.arms) == list(recipe.pretrain.arms)
        assert list(again.finetune.arms) == list(recipe.finetune.arms)
        # any YAML reader sees the same values (the report has its own)
        tree = yaml.safe_load(text)
        assert tree.pop("extends") is None
        assert tree == recipe.model_dump()


def test_show_says_where_each_value_comes_from():
    lines = as_yaml(*resolve("corrected+mini", ["seeds=[1, 2]", "data.jobs=2"])).splitlines()
    stripped = [line.strip() for line in lines]
    assert "jobs: 2  # --set data.jobs=2" in stripped
    assert "learning_rate: 0.0005  # mini" in stripped
    assert "clip_norm: 1.0  # corrected" in stripped
    assert "negatives: 100  # w2v2" in stripped  # as written, with its source
    # defaults that a stage changes in a shared section have that stage's source
    written = as_yaml(*resolve("as-written"))
    finetune = written[written.index("\nfinetune:") :]
    assert "betas: [0.9, 0.999]  # as run\n" in finetune
    assert "kind: tri_stage  # paper\n" in finetune


def test_every_default_has_a_source():
    keys = [
        line
        for line in as_yaml(load_recipe("as-written")).splitlines()
        if line.startswith("  ") and not line.endswith(":") and "{" not in line
    ]
    assert len(keys) > 100
    assert [line for line in keys if "  # " not in line] == []
