"""The command line: what users see, exit codes, and what each command imports."""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from reproduce.cli import main
from reproduce.errors import DivergedError, InterruptedRun
from reproduce.recipe import shipped_recipes

COMMANDS = [
    "prepare", "pretrain", "finetune", "run", "status", "report", "transcribe", "push",
    "ls", "cp", "show", "check", "schema",
]  # fmt: skip
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Each test works in its own folder; signal handlers are put back."""
    monkeypatch.chdir(tmp_path)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def w2vrep(capsys):
    """Run a command in this process: its exit code, stdout and stderr."""

    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            main(list(arguments))
        out, err = capsys.readouterr()
        code = done.value.code
        return SimpleNamespace(code=code, out=out, err=err)

    return run


def in_a_process(*arguments, **kwargs):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, **kwargs
    )


# ------------------------------------------------------------------------------------ what is there


def test_help_names_every_command(w2vrep):
    done = w2vrep("--help")
    assert done.code == 0
    assert re.findall(r"^  (\w+)  ", done.out.partition("Commands:")[2], re.M) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(w2vrep, command):
    done = w2vrep(command, "--help")
    assert done.code == 0
    assert f"Usage: w2vrep {command}" in done.out
    assert f"Example: w2vrep {command}" in done.out


def test_shells_can_complete(w2vrep):
    assert "--install-completion" in w2vrep("--help").out


def test_options_of_the_contract(w2vrep):
    stage = ["--work", "--set", "--device", "--dry-run"]
    for command in ("prepare", "pretrain", "finetune", "run"):
        text = w2vrep(command, "--help").out
        assert all(option in text for option in stage), command
        assert ("--arm" in text and "--seed" in text) == (command in ("pretrain", "finetune"))
        assert ("--jobs" in text and "--cluster" in text) == (command != "prepare")
    text = w2vrep("report", "--help").out
    for option in ("--work", "--out", "--strict", "--json", "--published"):
        assert option in text


def test_help_imports_neither_torch_nor_pandas_and_is_quick():
    code = (
        "import sys\n"
        "from reproduce.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as done: assert done.code == 0\n"
        "heavy = {'torch', 'pandas', 'numpy', 'pydantic', 'yaml', 'scipy', 'matplotlib'}\n"
        "print(*sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    seconds = []
    for _ in range(5):
        started = time.monotonic()
        done = in_a_process("-c", code)
        seconds.append(time.monotonic() - started)
        assert (done.returncode, done.stderr.strip()) == (0, "")
    assert statistics.median(seconds) < 1.5  # 0.2 on a machine that does nothing else


def test_python_dash_m_reproduce_is_the_same(w2vrep):
    listed = in_a_process("-m", "reproduce", "ls", cwd=ROOT)
    assert (listed.returncode, listed.stdout) == (0, w2vrep("ls").out)
    wrong = in_a_process("-m", "reproduce", "check", "as-runn", cwd=ROOT)
    assert (wrong.returncode, wrong.stderr) == (2, w2vrep("check", "as-runn").err)


def test_version(w2vrep):
    done = w2vrep("--version")
    assert (done.code, done.out) == (0, "w2vrep 0.1.0\n")


def test_ls(w2vrep):
    done = w2vrep("ls")
    assert done.code == 0
    assert [line.split()[0] for line in done.out.splitlines()] == list(shipped_recipes())


def test_cp_copies_and_never_overwrites(w2vrep, tmp_path):
    assert w2vrep("cp", "smoke", ".").code == 0
    copied = tmp_path / "smoke.yaml"
    assert copied.read_bytes() == shipped_recipes()["smoke"].read_bytes()
    copied.write_text("seeds: [9]\n", encoding="utf-8")
    for dest in (".", "smoke.yaml", str(copied)):
        done = w2vrep("cp", "mini" if dest != "." else "smoke", dest)
        assert done.code == 2
        assert "exists already" in done.err
    assert copied.read_text(encoding="utf-8") == "seeds: [9]\n"
    assert w2vrep("cp", "mini", "new/deep/mine.yml").code == 0
    assert w2vrep("check", "corrected+new/deep/mine.yml").code == 0


def test_check(w2vrep):
    done = w2vrep("check", "corrected+mini", "--set", "seeds=[1, 2]")
    assert (done.code, done.out) == (
        0,
        "corrected+mini: good; 11 pretraining and 12 fine-tuning arms x 2 seeds\n",
    )


def test_show_is_yaml_with_every_default_and_can_be_run_again(w2vrep, tmp_path):
    done = w2vrep("show", "as-run+mini", "--set", "pretrain.updates=7")
    assert done.code == 0
    tree = yaml.safe_load(done.out)
    assert tree["pretrain"]["updates"] == 7
    assert tree["pretrain"]["contrastive"]["negatives"] == 100
    assert "updates: 7  # --set pretrain.updates=7" in done.out
    (tmp_path / "again.yaml").write_text(done.out, encoding="utf-8")
    assert yaml.safe_load(w2vrep("show", "again.yaml").out) == tree


def test_schema_is_json(w2vrep):
    assert json.loads(w2vrep("schema").out)["$schema"].startswith("https://json-schema.org/")


# ------------------------------------------------------------------------------------------ dry run


def test_dry_run_shows_the_plan_and_touches_nothing(w2vrep, tmp_path):
    done = w2vrep("run", "smoke", "--dry-run", "--work", "w")
    assert done.code == 0
    for text in (
        "pretrain  8 arms x 3 seeds = 24 runs",
        "finetune  6 arms x 3 seeds = 18 runs",
        "updates 10 of 2 x 2 utterances, at most 0.0033 hours of audio",
        "seeds   1, 2, 3",
        "M parameters",
        "16 x 32 codes",
    ):
        assert text in done.out
    assert w2vrep("prepare", "smoke", "--dry-run").code == 0
    assert list(tmp_path.iterdir()) == []


def test_the_first_look_plans_eighteen_small_runs(w2vrep, tmp_path):
    done = w2vrep("run", "demo", "--dry-run")
    assert done.code == 0
    for text in (
        "pretrain  2 arms x 3 seeds = 6 runs",
        "finetune  4 arms x 3 seeds = 12 runs",
        "start            encoder no_icsl_8cb/seed-{seed} of",
        "rvq_4            encoder finetune/start/seed-{seed} of",
    ):
        assert text in done.out
    assert list(tmp_path.iterdir()) == []


def test_dry_run_of_some_arms_and_seeds(w2vrep):
    chosen = ["--arm", "icsl_8cb", "--arm", "no_icsl_2cb", "--arm", "icsl_8cb", "--seed", "3"]
    done = w2vrep("pretrain", "smoke", "--dry-run", *chosen)
    assert "pretrain  2 arms x 1 seeds = 2 runs" in done.out
    assert "arms    no_icsl_2cb, icsl_8cb" in done.out  # in the recipe's order, once
    assert "finetune" not in done.out


def test_dry_run_of_the_base_model_counts_its_parameters(w2vrep):
    done = w2vrep("pretrain", "as-run", "--dry-run", "--arm", "no_icsl_2cb")
    # transformers' Wav2Vec2ForPreTraining of that configuration has as many
    assert re.search(r"no_icsl_2cb +95\.04 M parameters", done.out)
    assert "714 of 16 x 4 utterances, at most 0.1778 hours" in done.out  # 64 x 10 s


def test_dry_run_of_arms_that_differ_in_length(w2vrep):
    done = w2vrep("pretrain", "smoke", "--dry-run", "--set", "pretrain.arms.icsl_2cb.updates=3")
    assert re.search(r"updates 3 of 2 x 2 .* \(icsl_2cb\)", done.out)


# --------------------------------------------------------------------------------------- exit codes

WRONG = [
    ([], 2, "Usage: w2vrep"),
    (["frobnicate"], 2, "No such command 'frobnicate'"),
    (["check"], 2, "Missing argument 'RECIPE'"),
    (["check", "as-runn"], 2, "did you mean as-run?"),
    (["check", "as-run+"], 2, "join names by +"),
    (["check", "mini+as-run"], 2, "as-run lies below mini already"),
    (["check", "as-run", "--set", "pretrain.update=3"], 2, "did you mean pretrain.updates?"),
    (["check", "as-run", "--set", "updates"], 2, "isn't key=value"),
    (["check", "as-run", "--set", "seeds=3"], 2, "seeds: should be a list in brackets, found 3"),
    (["check", "as-run", "--set", "data.corpus=timit"], 2, "'librispeech', 'folder', 'parquet'"),
    (["show", "as-run", "--set", "compute.precision=fp16"], 2, "found 'fp16'"),
    (["cp", "smok", "."], 2, "no shipped recipe 'smok'; did you mean smoke?"),
    (["cp", "smoke", "a.txt"], 2, "give a name ending in .yaml or a folder"),
    (["cp", "smoke", "/proc/none/x.yaml"], 2, "No such file or directory"),
    *(
        ([command, "as-run", *options], 2, "give --set data.root=/path/to/librispeech")
        for command, options in (
            ("prepare", []),
            ("run", []),
            ("check", []),
            ("run", ["--dry-run"]),
            ("prepare", ["--dry-run"]),
            ("run", ["--set", "finetune.encoder=/none"]),
        )
    ),
    (["run", "as-run", "--set", "data.root=/none"], 3, "/none: no such folder"),
    (["check", "as-run", "--set", "data.root=/none"], 3, "/none: no such folder"),
    (
        ["check", "smoke", "--set", "finetune.encoder=/none/e"],
        3,
        "finetune.encoder: /none/e: no",
    ),
    (["check", "smoke", "--set", "finetune.encoder=some/one"], 3, "lacks a commit"),
    (
        ["check", "as-run", "--set", "finetune.encoder=/none/e"],
        2,
        "as-run: 2 things that it names aren't here\n  data.root: corpus librispeech needs a folder"
        "\n  finetune.encoder: /none/e: no such folder\n  give --set data.root=/path/to/libri",
    ),
    (["prepare", "as-run", "--set", "data.root=/none"], 3, "/none: no such folder"),
    (["prepare", "smoke", "--work", "afile"], 2, "--work: afile is a file"),
    (["prepare", "smoke", "--work", "afile/w"], 2, "--work: afile is a file"),
    (["prepare", "smoke", "--arm", "icsl_2cb"], 2, "No such option: --arm"),
    (["pretrain", "smoke"], 3, "nothing is prepared here"),
    (["finetune", "smoke", "--work", "w"], 3, "run `w2vrep prepare RECIPE --work w`"),
    (["pretrain", "smoke", "--arm", "icsl_8c"], 2, "did you mean icsl_8cb?"),
    (["finetune", "smoke", "--arm", "icsl_8cb"], 2, "it has: no_rvq, rvq_1, rvq_2, rvq_4"),
    (["pretrain", "smoke", "--arm", "rvq_1"], 2, "'rvq_1' in pretrain: it is one of finetune"),
    (["pretrain", "smoke", "--seed", "7"], 2, "it has: 1, 2, 3"),
    (["pretrain", "smoke", "--seed", "x"], 2, "Invalid value for '--seed'"),
    (["pretrain", "smoke", "--device", "gpu"], 2, "is not one of 'auto', 'cpu', 'cuda'"),
    (["report"], 2, "give RECIPE, --work DIR or --published"),
    (["report", "smoke"], 3, "runs/smoke: no such work folder"),
    (["report", "smokee", "--work", "w"], 2, "did you mean smoke?"),
    (["report", "--work", "none"], 3, "none: no such work folder"),
    (["report", "--work", "."], 3, "not a work folder: neither recipe.yaml nor a run"),
    (["report", "--published"], 2, "give --out DIR"),
    (["report", "--published", "--out", "o", "--work", "w"], 2, "takes neither RECIPE nor --work"),
    (["report", "--published", "--out", "afile"], 2, "--out: afile is a file"),
]


@pytest.mark.parametrize(("arguments", "code", "found"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_input_gets_one_short_message(w2vrep, tmp_path, arguments, code, found):
    (tmp_path / "afile").write_text("here already")
    done = w2vrep(*arguments)
    assert done.code == code
    assert found in done.err
    assert done.out == ""
    assert "Traceback" not in done.err
    if arguments:  # no arguments: the whole help
        assert len(done.err.splitlines()) <= 5
    assert [p.name for p in tmp_path.iterdir() if p.name not in ("afile", "runs")] == []


def test_every_problem_of_a_recipe_at_once(w2vrep):
    sets = ["--set", "pretrain.update=3", "--set", "seeds=3", "--set", "model.heads=5"]
    done = w2vrep("run", "smoke", *sets)
    assert done.code == 2
    assert done.err.splitlines() == [
        "w2vrep: recipe smoke: 3 problems",
        "  seeds: should be a list in brackets, found 3 (from --set seeds=3)",
        "  pretrain.update: unknown key; did you mean pretrain.updates? "
        "(from --set pretrain.update=3)",
        "  model.heads: 5 does not divide width 64 (from --set model.heads=5)",
        "  w2vrep schema lists all keys",
    ]


@pytest.mark.parametrize("place", [0, 1, 3])
def test_debug_shows_the_traceback(w2vrep, place):
    arguments = ["check", "as-runn"]
    arguments.insert(place, "--debug")
    done = w2vrep(*arguments)
    assert done.code == 2
    assert done.err.startswith("Traceback")
    assert "UsageError: no recipe 'as-runn'" in done.err


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RuntimeError("odd"), 1, "w2vrep: unexpected RuntimeError: odd\n  --debug shows the tra"),
        (KeyError("name"), 1, "w2vrep: unexpected KeyError: 'name'\n"),
        (OSError(5, "Input/output error", "x"), 1, "w2vrep: x: Input/output error\n"),
        (
            OSError(28, "No space left on device"),
            3,
            "w2vrep: can't be written: No space left on device\n  make room ",
        ),
        (
            PermissionError(13, "Permission denied", "x"),
            3,
            "w2vrep: x: Permission denied\n  get the right to it, or choose another folder\n",
        ),
        (KeyboardInterrupt(), 130, "w2vrep: interrupted\n  run the same command again to go on\n"),
    ],
)
def test_what_nobody_expected(w2vrep, monkeypatch, error, code, message):
    monkeypatch.setattr("reproduce.recipe.load_recipe", failing(error))
    done = w2vrep("check", "as-run")
    assert done.code == code
    assert done.err.startswith(message)


def test_sigterm_outside_of_training(w2vrep, monkeypatch):
    monkeypatch.setattr(
        "reproduce.recipe.load_recipe", lambda *_: signal.raise_signal(signal.SIGTERM)
    )
    done = w2vrep("check", "as-run")
    assert done.code == 143
    assert done.err == "w2vrep: interrupted\n  run the same command again to go on\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DivergedError("2 of the runs diverged: a, b", do="look"), 4),
        (InterruptedRun("stopped after update 3", where="a", do="again", signal_number=2), 130),
        (InterruptedRun("stopped after update 3", where="a", do="again", signal_number=15), 143),
    ],
)
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_what_training_tells(w2vrep, monkeypatch, stage, error, code):
    monkeypatch.setattr(f"reproduce.stages.{stage}.{stage}", failing(error))
    done = w2vrep(stage, "smoke", "--device", "cpu")
    assert done.code == code
    assert done.err == f"w2vrep: {error}\n"


def test_other_ranks_say_nothing(w2vrep, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    done = w2vrep("check", "as-runn")
    assert (done.code, done.out, done.err) == (2, "", "")


def test_interrupted_while_preparing(tmp_path):
    """SIGINT from outside, wherever it meets the process, ends it with 130 and no traceback."""
    process = subprocess.Popen(
        [sys.executable, "-m", "reproduce", "prepare", "mini", "--work", str(tmp_path / "w"),
         "--set", "data.synthetic.hours=20"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # a shell's background job ignores SIGINT, and its children would inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    started = time.monotonic()
    while not (tmp_path / "w" / "recipe.yaml").exists() and time.monotonic() - started < 60:
        time.sleep(0.1)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "run the same command again to go on" in err


@pytest.mark.parametrize("read", [0, 1])
def test_a_closed_pipe_is_no_traceback(read):
    process = subprocess.Popen(
        [sys.executable, "-m", "reproduce", "schema"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    process.stdout.read(read)
    process.stdout.close()
    assert process.stderr.read() == ""
    process.wait(timeout=60)


# ------------------------------------------------------------------------------------------- report


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """``report --published`` in a process that may not import torch."""
    out = tmp_path_factory.mktemp("published")
    code = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['torchaudio'] = None\n"
        "from reproduce.cli import main\n"
        f"main(['report', '--published', '--out', {str(out)!r}, '--json', '--strict'])\n"
    )
    done = in_a_process("-c", code, env={**os.environ, "MPLBACKEND": "Agg"})
    assert (done.returncode, done.stderr) == (0, "")
    return out, json.loads(done.stdout)


def test_report_needs_no_torch(published):
    out, summary = published
    assert Path(summary["page"]) == out / "index.html"
    assert (out / "index.html").stat().st_size > 10_000


def test_strict_exits_5_where_a_claim_is_contradicted(w2vrep, monkeypatch):
    summary = SimpleNamespace(page=Path("p"), contradicted=["as-run: C1"], as_json=dict)
    monkeypatch.setattr("reproduce.report.build_report", lambda *_, **__: summary)
    done = w2vrep("report", "--published", "--out", "o", "--strict")
    assert (done.code, done.out) == (5, "report: p\n")
    assert done.err == "w2vrep: contradicted: as-run: C1\n"
    assert w2vrep("report", "--published", "--out", "o").code == 0
