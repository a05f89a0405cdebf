"""run: the four stages in order."""

from __future__ import annotations

from collections.abc import Callable

from reproduce.errors import DivergedError, FailedRunsError, InterruptedRun
from reproduce.recipe.schema import Recipe
from reproduce.records import Stage, WorkFolder
from reproduce.report import ReportSummary, build_report
from reproduce.stages.finetune import finetune
from reproduce.stages.fleet import Hands, train_by
from reproduce.stages.prepare import prepare, summary_lines
from reproduce.stages.pretrain import pretrain
from reproduce.tasks.corpus import require_corpus
from reproduce.tasks.encoders import check_encoders
from reproduce.training.distributed import Ranks


def run(
    recipe: Recipe,
    work: WorkFolder,
    ranks: Ranks,
    say: Callable[[str], None],
    hands: Hands | None = None,
) -> ReportSummary | None:
    """prepare, pretrain, finetune, report.

    What goes wrong in fine-tuning, or diverges, is told after the report is made.

    Args:
        hands: the workers that train, if this process doesn't.

    Returns:
        The report's summary on the main rank, None on the others.

    Raises:
        UsageError: no folder is named for the corpus; nothing is begun, as in the next case.
        DataError: the corpus isn't there, or an encoder that doesn't come from this work folder
            can't be had.
        DivergedError: some run diverged; everything else is done.
        FailedRunsError: some run failed in another process; everything else is done.
    """
    if ranks.main:
        require_corpus(recipe, work)
    check_encoders(recipe, ranks)
    if ranks.main:
        for line in summary_lines(prepare(recipe, work)):
            say(line)
    ranks.barrier()

    def train(stage: Stage, itself: Callable[..., None]) -> None:
        arms = list(getattr(recipe, stage).arms)
        if hands is None:
            itself(recipe, work, ranks, arms, recipe.seeds)
        else:
            train_by(hands, stage, recipe, work, arms, recipe.seeds)

    problem: Exception | None = None
    try:
        train("pretrain", pretrain)
    except (DivergedError, FailedRunsError) as error:
        problem = error
    try:
        train("finetune", finetune)
    except InterruptedRun:
        raise
    except Exception as error:  # what lacks its encoder since a run failed isn't the first problem
        problem = problem if isinstance(problem, FailedRunsError) else error
    # No barrier: a rank that failed alone has the others wait for nothing.
    summary = build_report([work.root], work.report) if ranks.main else None
    if problem is not None:
        if summary is not None:
            say(f"report: {summary.page}")
        raise problem
    return summary
