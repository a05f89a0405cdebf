"""The commands. A stage is imported when it runs: ``--help`` needs neither torch nor pandas."""

from __future__ import annotations

import difflib
import io
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from reproduce.errors import ContradictedError, DataError, UsageError, W2vrepError

if TYPE_CHECKING:
    from reproduce.recipe import Recipe
    from reproduce.records import Stage, WorkFolder


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class ClusterName(StrEnum):
    slurm = "slurm"


class TextFormat(StrEnum):
    txt = "txt"
    jsonl = "jsonl"


app = typer.Typer(
    name="w2vrep",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Reproduce and judge a wav2vec 2.0 study: ICSL in pretraining, RVQ before CTC.",
    epilog="RECIPE: a shipped recipe (w2vrep ls), a YAML file, or several joined by +.",
)

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="as-run, corrected+mini, ...")
]
Work = Annotated[Path | None, typer.Option(help="Work folder; default runs/<RECIPE>.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE laid over; repeatable.")]
ModelArgument = Annotated[
    Path, typer.Argument(metavar="MODEL", help="model/ of a finished run, or another folder.")
]
DeviceOption = Annotated[Device, typer.Option(help="Where to compute.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan, touch nothing.")]
Estimate = Annotated[
    bool, typer.Option("--estimate", help="The plan, with time and memory of a few timed updates.")
]
Arms = Annotated[list[str] | None, typer.Option("--arm", help="Only this arm; repeatable.")]
Seeds = Annotated[list[int] | None, typer.Option("--seed", help="Only this seed; repeatable.")]
Jobs = Annotated[
    str | None,
    typer.Option(metavar="N|gpus", help="Workers on this machine, one a GPU; or a cluster's jobs."),
]
ClusterOption = Annotated[
    ClusterName | None, typer.Option(help="Train in jobs of a cluster; see cluster in w2vrep show.")
]


def _version(wanted: bool) -> None:
    if wanted:
        from reproduce import __version__

        print(f"w2vrep {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    pass


# ------------------------------------------------------------------------------------------- stages


@app.command(epilog="Example: w2vrep prepare corrected --set data.root=/path/to/LibriSpeech")
def prepare(
    recipe: RecipeArgument,
    work: Work = None,
    sets: Sets = None,
    device: DeviceOption = Device.auto,
    dry_run: DryRun = False,
) -> None:
    """Corpus to manifest, nested subsets and packed audio."""
    loaded, folder = _load(recipe, sets, work, device)
    if dry_run:
        return _plan(loaded, folder, ["prepare"])
    from reproduce.data.disk import within
    from reproduce.stages.prepare import prepare, summary_lines

    with within(folder.root):
        summary = prepare(loaded, folder)
    for line in summary_lines(summary):
        print(line)
    print(f"data: {folder.data}")


@app.command(
    epilog="Example: w2vrep pretrain corrected+mini --arm icsl_8cb --seed 1\n\n"
    "Example: w2vrep pretrain corrected --jobs gpus --set data.root=/path/to/LibriSpeech"
)
def pretrain(
    recipe: RecipeArgument,
    work: Work = None,
    sets: Sets = None,
    device: DeviceOption = Device.auto,
    dry_run: DryRun = False,
    estimate: Estimate = False,
    arm: Arms = None,
    seed: Seeds = None,
    jobs: Jobs = None,
    cluster: ClusterOption = None,
) -> None:
    """Train every arm and seed of the pretraining grid."""
    _grid("pretrain", recipe, work, sets, device, dry_run, estimate, arm, seed, jobs, cluster)


@app.command(
    epilog="Example: w2vrep finetune corrected+mini --set finetune.encoder=facebook/wav2vec2-base"
)
def finetune(
    recipe: RecipeArgument,
    work: Work = None,
    sets: Sets = None,
    device: DeviceOption = Device.auto,
    dry_run: DryRun = False,
    estimate: Estimate = False,
    arm: Arms = None,
    seed: Seeds = None,
    jobs: Jobs = None,
    cluster: ClusterOption = None,
) -> None:
    """Train every RVQ arm and seed on an encoder."""
    _grid("finetune", recipe, work, sets, device, dry_run, estimate, arm, seed, jobs, cluster)


@app.command(
    epilog="Example: w2vrep run corrected+mini --work runs/first --dry-run\n\n"
    "Example: w2vrep run smoke --jobs 2\n\n"
    "Example: w2vrep run corrected --cluster slurm --set cluster.slurm_partition=gpu"
)
def run(
    recipe: RecipeArgument,
    work: Work = None,
    sets: Sets = None,
    device: DeviceOption = Device.auto,
    dry_run: DryRun = False,
    estimate: Estimate = False,
    jobs: Jobs = None,
    cluster: ClusterOption = None,
) -> None:
    """prepare, pretrain, finetune and report in order."""
    loaded, folder = _load(recipe, sets, work, device)
    if dry_run or estimate:
        return _plan(loaded, folder, ["prepare", "pretrain", "finetune"], estimate=estimate)
    from reproduce.data.disk import within
    from reproduce.stages.fleet import hands_of
    from reproduce.stages.run import run
    from reproduce.training import distributed

    hands = hands_of(loaded, jobs, cluster, _worker_options(recipe, folder, sets, device))
    ranks_on = loaded.compute.device if hands is None else "cpu"
    with within(folder.root), distributed.joined(ranks_on) as ranks:
        summary = run(loaded, folder, ranks, print, hands)
    if summary is not None:
        print(f"report: {summary.page}")


@app.command(epilog="Example: w2vrep status corrected+mini --watch")
def status(
    recipe: RecipeArgument,
    work: Work = None,
    sets: Sets = None,
    arm: Arms = None,
    seed: Seeds = None,
    watch: Annotated[bool, typer.Option("--watch", help="Again every few seconds.")] = False,
) -> None:
    """The grid from its files: states, losses, time left, who trains what. Imports no torch."""
    import time

    from reproduce.grid.status import STAGES, grid_runs, run_state, status_lines

    loaded, folder = _load(recipe, sets, work, Device.auto)
    arms = list(dict.fromkeys([*loaded.pretrain.arms, *loaded.finetune.arms]))
    chosen = _choose("arm", arm, arms), _choose("seed", seed, loaded.seeds)
    if not folder.root.is_dir():
        raise UsageError("no such folder", where=str(folder.root), do="give --work DIR")
    runs = grid_runs(loaded, folder, STAGES, *chosen)
    while True:
        states = [run_state(run, updates) for run, updates in runs]
        if watch and sys.stdout.isatty():
            print("\033[2J\033[H", end="")
        print("\n".join(status_lines(states)), flush=True)
        if not watch or all(state.over for state in states):
            return
        time.sleep(5)


@app.command(
    epilog="Example: w2vrep report --work runs/as-run --work runs/corrected --out side-by-side"
)
def report(
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]")] = None,
    work: Annotated[
        list[Path] | None, typer.Option(help="Work folder; repeatable: recipes side by side.")
    ] = None,
    sets: Sets = None,
    out: Annotated[Path | None, typer.Option(help="Default: report/ of the first folder.")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit 5 if a claim is contradicted.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
    published: Annotated[
        bool, typer.Option("--published", help="The published data alone; needs --out.")
    ] = False,
    keep: Annotated[
        bool,
        typer.Option(
            "--keep-runs",
            help="Copy what a report reads of the runs (no weights) to runs/ of --out, to commit.",
        ),
    ] = False,
) -> None:
    """Tables, figures, claims and one page. Imports no torch."""
    from reproduce.records import WorkFolder

    folders = list(work or [])
    if published:
        if recipe is not None or folders:
            raise UsageError("--published takes neither RECIPE nor --work", do="leave them out")
        if out is None:
            raise UsageError("--published needs a folder to write to", do="give --out DIR")
    elif not folders:
        if recipe is None:
            raise UsageError("nothing to report on", do="give RECIPE, --work DIR or --published")
        folders = [_load(recipe, sets, None, Device.auto)[1].root]
    elif recipe is not None:
        _load(recipe, sets, None, Device.auto)  # a mistyped name is an error here too
    from reproduce.data.disk import within
    from reproduce.report import build_report

    target = _folder(out if out is not None else WorkFolder(folders[0]).report, "--out")
    with within(target):
        summary = build_report(folders, target, published_only=published, keep=keep)
    if as_json:
        print(json.dumps(summary.as_json(), indent=1))
    else:
        print(f"report: {summary.page}")
    if strict and summary.contradicted:
        raise ContradictedError(f"contradicted: {', '.join(summary.contradicted)}")


# ------------------------------------------------------------------------------------------- models


@app.command(
    epilog="Example: w2vrep transcribe runs/smoke/finetune/rvq_2/seed-1/model a.flac b.wav"
)
def transcribe(
    model: ModelArgument,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Audio files.")],
    form: Annotated[
        TextFormat, typer.Option("--format", help="Text, or a JSON object a line.")
    ] = TextFormat.txt,
    device: DeviceOption = Device.auto,
) -> None:
    """Text of audio files by a finished recognizer; long ones are read in windows.

    As txt, a line a file; of several files each begins with its name and a tab.
    """
    from reproduce.stages.transcribe import transcribe

    failed, empty = [], True
    for found in transcribe(model, files, device.value):
        if found.error is not None:
            failed.append(found.file)
            print(f"{found.file}: {found.error}", file=sys.stderr)
        empty = empty and not found.text
        if form is TextFormat.jsonl:
            print(found.as_json(), flush=True)
        elif found.text is not None:
            print(f"{found.file}\t{found.text}" if len(files) > 1 else found.text, flush=True)
    if failed:
        raise DataError(
            f"{len(failed)} of {len(files)} files can't be transcribed: {', '.join(failed)}",
            do="the reasons are above; the others are done",
        )
    if empty:
        text = "no file gave any text; the model's README.md says how well it recognizes"
        print(f"warning: {text}", file=sys.stderr)


@app.command(
    epilog="Example: w2vrep push runs/smoke/finetune/rvq_2/seed-1/model me/rvq_2 --private"
)
def push(
    model: ModelArgument,
    name: Annotated[str, typer.Argument(metavar="NAME", help="OWNER/NAME on the hub.")],
    private: Annotated[bool, typer.Option("--private", help="If it is made anew.")] = False,
) -> None:
    """Upload a finished model with its card to the Hugging Face hub."""
    from reproduce.stages.push import push

    print(f"pushed: {push(model, name, private=private)}")


# ------------------------------------------------------------------------------------------ recipes


@app.command("ls", epilog="Example: w2vrep ls")
def list_recipes() -> None:
    """List the shipped recipes."""
    from reproduce.recipe import shipped_recipes, yaml12

    for name, path in shipped_recipes().items():
        tree = yaml12.load(path.read_text(encoding="utf-8")) or {}
        print(f"{name:12}  {tree.get('description', '')}")


@app.command("cp", epilog="Example: w2vrep cp mini mine.yaml")
def copy_recipe(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="File or folder.")],
) -> None:
    """Copy a shipped recipe out to edit it."""
    from reproduce.recipe import shipped_recipes

    known = shipped_recipes()
    if name not in known:
        raise UsageError(f"no shipped recipe {name!r}{_near(name, known)}", do="see w2vrep ls")
    if dest.is_dir():
        dest = dest / f"{name}.yaml"
    if dest.suffix not in (".yaml", ".yml"):
        raise UsageError(f"{dest} isn't a .yaml file", do="give a name ending in .yaml or a folder")
    if dest.exists():
        raise UsageError(f"{dest} exists already", do="choose another name, or remove it first")
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(known[name], dest)
    except OSError as error:
        raise UsageError(
            f"{dest} can't be written: {error.strerror}", do="choose another"
        ) from None
    shown = dest if dest.is_absolute() or len(dest.parts) > 1 else f"./{dest}"
    print(f"{dest}: edit it, then w2vrep check {shown}")


@app.command(epilog="Example: w2vrep show corrected+mini --set pretrain.updates=300")
def show(recipe: RecipeArgument, sets: Sets = None) -> None:
    """Print the resolved recipe as YAML, every default filled in."""
    from reproduce.recipe.dump import as_yaml
    from reproduce.recipe.load import resolve

    print(as_yaml(*resolve(recipe, sets or [])), end="")


@app.command(epilog="Example: w2vrep check corrected+mini+./mine.yaml")
def check(recipe: RecipeArgument, sets: Sets = None) -> None:
    """Validate a recipe, and find what isn't on disk: every problem at once."""
    from reproduce.recipe import load_recipe
    from reproduce.tasks.on_disk import require_on_disk

    loaded = load_recipe(recipe, sets or [])
    require_on_disk(loaded)
    seeds = f"{len(loaded.seeds)} seed{'s' if len(loaded.seeds) > 1 else ''}"
    print(
        f"{loaded.name}: good; {len(loaded.pretrain.arms)} pretraining and "
        f"{len(loaded.finetune.arms)} fine-tuning arms x {seeds}"
    )


@app.command(epilog="Example: w2vrep schema > recipe.schema.json")
def schema() -> None:
    """Print the JSON Schema of a recipe."""
    from reproduce.recipe.dump import json_schema

    print(json.dumps(json_schema(), indent=1))


# ------------------------------------------------------------------------------------------ wiring


def _load(
    spec: str, sets: Sequence[str] | None, work: Path | None, device: Device
) -> tuple[Recipe, WorkFolder]:
    from reproduce.recipe import load_recipe
    from reproduce.records import WorkFolder

    overlays = list(sets or [])
    if device is not Device.auto:
        overlays.append(f"compute.device={device.value}")
    recipe = load_recipe(spec, overlays)
    folder = work if work is not None else Path("runs") / recipe.name
    return recipe, WorkFolder(_folder(folder, "--work"))


def _folder(path: Path, option: str) -> Path:
    """A folder that is there or can be made."""
    taken = next((p for p in (path, *path.parents) if p.exists() and not p.is_dir()), None)
    if taken is not None:
        raise UsageError(f"{taken} is a file", where=option, do="give a folder")
    return path


def _grid(
    stage: Stage,
    spec: str,
    work: Path | None,
    sets: Sequence[str] | None,
    device: Device,
    dry_run: bool,
    estimate: bool,
    arms: Sequence[str] | None,
    seeds: Sequence[int] | None,
    jobs: str | None,
    cluster: str | None,
) -> None:
    recipe, folder = _load(spec, sets, work, device)
    other: Stage = "finetune" if stage == "pretrain" else "pretrain"
    misplaced = [arm for arm in arms or [] if arm in getattr(recipe, other).arms]
    known = list(getattr(recipe, stage).arms)
    if misplaced and misplaced[0] not in known:
        raise UsageError(
            f"no arm {misplaced[0]!r} in {stage}: it is one of {other}",
            do=f"w2vrep {other} --arm {misplaced[0]}, or one that it has: {', '.join(known)}",
        )
    chosen = _choose("arm", arms, known)
    chosen_seeds = _choose("seed", seeds, recipe.seeds)
    if dry_run or estimate:
        return _plan(recipe, folder, [stage], chosen, chosen_seeds, estimate=estimate)
    from reproduce.data.disk import within
    from reproduce.stages.fleet import hands_of, train_by

    hands = hands_of(recipe, jobs, cluster, _worker_options(spec, folder, sets, device))
    if hands is not None:
        with within(folder.root):
            train_by(hands, stage, recipe, folder, chosen, chosen_seeds)
        print(f"{stage}: {folder.root / stage}")
        return
    from reproduce.training import distributed

    train: Callable[..., None]
    if stage == "pretrain":
        from reproduce.stages.pretrain import pretrain as train
    else:
        from reproduce.stages.finetune import finetune as train
    with within(folder.root), distributed.joined(recipe.compute.device) as ranks:
        train(recipe, folder, ranks, chosen, chosen_seeds)
    if ranks.main:
        print(f"{stage}: {folder.root / stage}")


def _worker_options(
    spec: str, folder: WorkFolder, sets: Sequence[str] | None, device: Device
) -> list[str]:
    """RECIPE and the options that every worker gets, as they were given here."""
    given = [f"--set={item}" for item in sets or []]
    return [spec, f"--work={folder.root}", f"--device={device.value}", *given]


def _choose(what: str, given: Sequence[Any] | None, known: list[Any]) -> list[Any]:
    """The given ones in the recipe's order, all if none is given."""
    for item in given or []:
        if item not in known:
            names = ", ".join(map(str, known))
            near = _near(str(item), map(str, known))
            raise UsageError(f"no {what} {item!r} in this recipe{near}", do=f"it has: {names}")
    return [item for item in known if not given or item in given]


def _near(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _plan(
    recipe: Recipe,
    folder: WorkFolder,
    stages: Sequence[str],
    arms: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    *,
    estimate: bool = False,
) -> None:
    from reproduce.grid.plan import plan_lines

    if "prepare" in stages:
        from reproduce.tasks.corpus import require_corpus

        require_corpus(recipe, folder)
    for line in plan_lines(recipe, folder, stages, arms, seeds):
        print(line, flush=True)
    if estimate:
        from reproduce.grid.estimate import estimate_lines
        from reproduce.training import distributed

        with distributed.joined(recipe.compute.device) as ranks:
            for line in estimate_lines(recipe, folder, ranks, stages, arms, seeds or recipe.seeds):
                print(line, flush=True)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line; exit codes as the errors say, one short message, no traceback."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in argv
    argv = [item for item in argv if item != "--debug"]
    quiet = os.environ.get("RANK", "0") != "0"
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path may hold bytes that no text has
        sys.stdout.reconfigure(errors="backslashreplace")
    for number in (signal.SIGTERM, signal.SIGUSR1):  # SLURM's warning asks the same
        signal.signal(number, lambda *_: _stop(signal.SIGTERM, quiet, debug))
    try:
        result = app(args=argv, prog_name="w2vrep", standalone_mode=False)
        if result == 128 + signal.SIGINT:  # what newer typers make of KeyboardInterrupt
            raise KeyboardInterrupt
        sys.exit(result if isinstance(result, int) else 0)
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _stop(signal.SIGINT, quiet, debug)
    except BrokenPipeError:
        sys.exit(1)
    except W2vrepError as error:
        _message(f"w2vrep: {error}", quiet, debug)
        sys.exit(error.exit_code)
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # click's, or typer's own copy
            error.show()
            sys.exit(error.exit_code)
        if isinstance(error, OSError):
            from reproduce.data.disk import disk_error

            if told := disk_error(error):
                _message(f"w2vrep: {told}", quiet, debug)
                sys.exit(told.exit_code)
        text = f"unexpected {type(error).__name__}: {str(error).strip() or 'no message'}"
        if isinstance(error, OSError) and error.strerror:
            text = f"{error.filename or 'system'}: {error.strerror}"
        _message(f"w2vrep: {text}\n  --debug shows the traceback", quiet, debug)
        sys.exit(1)
    finally:
        _flush()


def _flush() -> None:
    """Whoever reads a pipe may have seen enough: then nothing more is written at exit either."""
    try:
        sys.stdout.flush()
        if sys.__stdout__ is not None:  # typer wraps the other one where a pipe broke
            sys.__stdout__.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _stop(number: int, quiet: bool, debug: bool) -> NoReturn:
    _message("w2vrep: interrupted\n  run the same command again to go on", quiet, debug)
    sys.exit(128 + number)


def _message(text: str, quiet: bool, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    elif not quiet:
        print(text, file=sys.stderr)
