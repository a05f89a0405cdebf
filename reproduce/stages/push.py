"""push: a finished model with its card to the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from reproduce.errors import DataError, UsageError
from reproduce.records import MODEL_FILES, RunFolder, WorkFolder
from reproduce.tasks.card import CARD, write_card

FILES = ["*.json", "*.safetensors", "*.py", CARD]
"""What of a model folder is uploaded."""


def push(model: Path, name: str, *, private: bool = False) -> str:
    """Upload a model folder, its card first made if it lacks one; the address it has then.

    Args:
        model: ``model/`` of a finished run, or another folder with a card of its own.
        name: NAME or OWNER/NAME on the hub; made if it isn't there.
        private: whether it is then made private.

    Raises:
        DataError: no such model, no card, or the hub can't be reached or refuses.
        UsageError: a name that the hub can't have, or nobody is logged in.
    """
    missing = [file for file in MODEL_FILES if not (model / file).is_file()]
    if missing:
        raise DataError(
            f"no finished model: {' and '.join(missing)} not there",
            where=str(model),
            do="give the model/ folder of a finished run",
        )
    if not (model / CARD).is_file():
        run = _run_of(model)
        if run is None:
            raise DataError(
                f"no model card, {CARD}, and no run to make it from",
                where=str(model),
                do="give the model/ folder of a finished run, or write the card",
            )
        write_card(*run)
    return _upload(model, name, private)


def _run_of(model: Path) -> tuple[WorkFolder, RunFolder] | None:
    """The run that ``WORK/STAGE/ARM/seed-N/model`` belongs to."""
    model = model.resolve()
    root, seed = model.parent, re.fullmatch(r"seed-(\d+)", model.parent.name)
    stage = root.parent.parent.name
    if seed is None or stage not in ("pretrain", "finetune") or not (root / "run.json").is_file():
        return None
    work = WorkFolder(root.parents[2])
    return work, work.run(stage, root.parent.name, int(seed[1]))  # type: ignore[arg-type]


def _upload(model: Path, name: str, private: bool) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    log_in = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"
    try:
        api = HfApi()
        repository = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=model,
            allow_patterns=FILES,
            commit_message=f"Upload by w2vrep: {model.resolve().parent.parent.name}",
        )
        return str(repository)
    except HFValidationError as error:
        raise UsageError(_first_line(error), where=f"NAME {name}") from error
    except LocalTokenNotFoundError as error:
        raise UsageError("nobody is logged in to the hub", do=log_in) from error
    except HfHubHTTPError as error:
        refused = getattr(error.response, "status_code", None) in (401, 403)
        kind = UsageError if refused else DataError
        do = log_in if refused else ""
        raise kind(f"the hub refuses: {_first_line(error)}", where=name, do=do) from error
    except Exception as error:  # the hub's client raises errors of several HTTP libraries
        raise DataError(
            f"the hub can't be reached: {type(error).__name__}: {_first_line(error)}",
            where=name,
            do="check the network, HF_HUB_OFFLINE and HF_ENDPOINT, and run it again",
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
