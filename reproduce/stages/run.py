"""run: the four stages in order."""

from __future__ import annotations

from collections.abc import Callable

from reproduce.errors import DivergedError
from reproduce.recipe.schema import Recipe
from reproduce.records import WorkFolder
from reproduce.report import ReportSummary, build_report
from reproduce.stages.finetune import finetune
from reproduce.stages.prepare import prepare, summary_lines
from reproduce.stages.pretrain import pretrain
from reproduce.training.distributed import Ranks


def run(
    recipe: Recipe, work: WorkFolder, ranks: Ranks, say: Callable[[str], None]
) -> ReportSummary | None:
    """prepare, pretrain, finetune, report. A diverged run is told after the report is made.

    Returns:
        The report's summary on the main rank, None on the others.

    Raises:
        DivergedError: some run diverged; everything else is done.
    """
    if ranks.main:
        for line in summary_lines(prepare(recipe, work)):
            say(line)
    ranks.barrier()
    diverged: DivergedError | None = None
    for stage, grid in ((pretrain, recipe.pretrain.arms), (finetune, recipe.finetune.arms)):
        try:
            stage(recipe, work, ranks, list(grid), recipe.seeds)
        except DivergedError as error:
            diverged = error
    summary = build_report([work.root], work.report) if ranks.main else None
    ranks.barrier()
    if diverged is not None:
        if summary is not None:
            say(f"report: {summary.page}")
        raise diverged
    return summary
