"""Push a pruned model to the Hugging Face Hub: model, processor, card, report and plots as one commit."""

import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelInfo,
    get_token,
    is_offline_mode,
)
from huggingface_hub.errors import (
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, logging

from ..blocks import some_of
from .card import CARD_NAME, may_write_card, write_card
from .html import to_html
from .loading_code import processor_class
from .page import to_markdown
from .place import ASIDE, WEIGHTS, add_written
from .plain import without_local, without_paths
from .records import HTML_NAME, PAGE_NAME, PLOT_FOLDER, PLOTS, REPORT_NAME, Record
from .saving import save_pruned

logger = logging.get_logger(__name__)

COMMIT_MESSAGE = "Push a model pruned by hf_subprune"


@dataclass(frozen=True)
class PushOptions:
    """How to push.

    Args:
        private: Whether a repo that is made is private; the default of the account when left out.
        revision: Branch to commit to, made if need be; `"main"` when left out.
        create_pr: Open a pull request with the commit.
        force: Overwrite a repo that was not pushed by hf_subprune.
        token: The one that `hf auth login` or `HF_TOKEN` stores when left out.
        commit_message: First line of the commit.
    """

    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    force: bool = False
    token: str | None = field(default=None, repr=False)
    commit_message: str | None = None


class PushError(OSError):
    """Nothing was committed.

    Args:
        repo_id: Where the model was to go.
        reason: What happened and what to do.
        folder: Holds everything that was to be uploaded.
        command: Tries again from `folder`.
    """

    def __init__(self, repo_id: str, reason: str, folder: Path, command: str) -> None:
        super().__init__(
            f"Nothing was pushed to {repo_id}: {reason}\nThe model is in {folder}. To try again:\n  {command}"
        )
        self.reason = reason
        self.folder = folder
        self.command = command


def push_model(
    report: Record,
    repo_id: str,
    model: PreTrainedModel,
    processing_class: Any = None,
    options: PushOptions | None = None,
    *,
    card_data: Mapping[str, Any] | None = None,
) -> CommitInfo:
    """Save a pruned model into a temporary folder and push that; see `PruneReport.push_to_hub`.

    Args:
        report: From `prune`.
        repo_id: `"user/name"` or `"organization/name"`.
        model: After `prune`.
        processing_class: Tokenizer, image processor or processor; may be `None`.
        options: How to push.
        card_data: Metadata of the card that replaces what is found out.

    Raises:
        ValueError: `repo_id` is not a valid one; nothing was saved.
        PushError: as `push_folder`. The temporary folder is kept and named, otherwise it is removed.
    """
    check_repo_name(repo_id)
    folder = Path(tempfile.mkdtemp(prefix="hf_subprune_")) / repo_id.split("/")[-1]
    save_pruned(folder, model, processing_class, report)
    commit = push_folder(folder, repo_id, options, card_data=card_data)
    shutil.rmtree(folder.parent)
    return commit


def push_folder(
    folder: str | Path,
    repo_id: str,
    options: PushOptions | None = None,
    *,
    card_data: Mapping[str, Any] | None = None,
) -> CommitInfo:
    """Upload the folder of a pruned model as one commit.

    Files are sent first and committed together at the end: a push that is cut leaves the repo as it was, and the next
    one sends only what has not arrived.

    Args:
        folder: With the saved model and `subprune_report.json`. Gets a `README.md` unless it has one of yours.
        repo_id: `"user/name"` or `"organization/name"`; made if need be.
        options: How to push.
        card_data: Metadata of a card that is written; see `card.model_card`.

    Raises:
        ValueError: `repo_id` is not a valid one.
        FileNotFoundError: the folder lacks the model or its report.
        PushError: nothing was committed: no network, token or permission, the repo is another model's, or the upload
            was cut.
    """
    check_repo_name(repo_id)
    folder = Path(folder).absolute()
    report = _check_folder(folder)
    if may_write_card(folder):
        write_card(folder, report, repo_id, card_data)
        add_written(folder, CARD_NAME)
    options = options or PushOptions()
    command = push_command(folder, repo_id, options)
    api = HfApi(token=options.token, library_name="hf_subprune", library_version=version("hf_subprune"))
    try:
        return _commit(api, _prepare_repo(api, repo_id, options), folder, options)
    except KeyboardInterrupt:
        logger.warning("Stopped; nothing was pushed. To try again:\n  %s", command)
        raise
    except Exception as error:  # whatever stopped it, the caller must learn where the model is
        raise PushError(repo_id, _reason(error, repo_id), folder, command) from error


def push_command(folder: str | Path, repo_id: str, options: PushOptions) -> str:
    """The command that does the same as `push_folder`; a token is not written out."""
    words = ["hf-subprune", "push", str(folder), repo_id]
    words += ["--private"] * bool(options.private)
    words += ["--revision", options.revision] if options.revision else []
    words += ["--create-pr"] * options.create_pr
    words += ["--force"] * options.force
    return shlex.join(words)


class _RefusedError(Exception):
    """The Hub would take the push, we do not."""


def check_repo_name(repo_id: str) -> None:
    """Refuse what is no name of a repo to push to.

    Raises:
        ValueError: it is not `user/name`.
    """
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"A repo to push to is named 'user/name' or 'organization/name', got {repo_id!r}.")


def _check_folder(folder: Path) -> Record:
    if not (folder / REPORT_NAME).is_file():
        raise FileNotFoundError(
            f"{folder} holds no {REPORT_NAME}, so it is not a pruned model: save one with `hf-subprune prune --out`, "
            "or with `model.save_pretrained(folder)` and `report.save(folder)`."
        )
    weights = [path for path in folder.glob("*.safetensors") if not path.is_symlink()]
    if not (folder / CONFIG_NAME).is_file() or (folder / CONFIG_NAME).is_symlink() or not weights:
        raise FileNotFoundError(
            f"{folder} holds a report but no model ({CONFIG_NAME} and *.safetensors, no links): "
            "`model.save_pretrained(folder)`."
        )
    return Record.load(folder)


def _prepare_repo(api: HfApi, repo_id: str, options: PushOptions) -> ModelInfo:
    """Make the repo and the branch if need be.

    Returns:
        What the commit goes on top of.
    """
    if is_offline_mode():
        raise OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
    if not (api.token or get_token()):
        raise LocalTokenNotFoundError("no token was found")
    try:
        head = api.model_info(repo_id)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=options.private, exist_ok=True)
        head = api.model_info(repo_id)
    if options.private and not head.private:
        settings = f"{api.endpoint}/{repo_id}/settings"
        raise _RefusedError(f"it exists and is public, and private was asked for. Change that at {settings}.")
    new_branch = False
    if options.revision:
        try:
            head = api.model_info(repo_id, revision=options.revision)
        except RevisionNotFoundError:
            new_branch = not options.create_pr
    files = {file.rfilename for file in head.siblings or ()} - {".gitattributes"}
    if files and REPORT_NAME not in files and not (options.force or options.create_pr):
        raise _RefusedError(
            f"it holds {len(files)} files that hf_subprune did not push ({', '.join(sorted(files)[:3])}...). Choose "
            "another name, propose the change with --create-pr (create_pr=True), or overwrite with --force "
            "(force=True)."
        )
    if new_branch:
        api.create_branch(repo_id, branch=str(options.revision))
    return head


def _commit(api: HfApi, head: ModelInfo, folder: Path, options: PushOptions) -> CommitInfo:
    """One commit with every file of the folder; weights of another model that stood there are deleted in it."""
    files = _to_push(folder)
    stale = {file.rfilename for file in head.siblings or ()} - set(files)
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationDelete(name) for name in sorted(stale) if any(fnmatchcase(name, weights) for weights in WEIGHTS)
    ]
    operations += [CommitOperationAdd(name, content) for name, content in files.items()]
    # Unlike `upload_folder`, which commits a long upload in parts, `create_commit` sends everything and commits once.
    return api.create_commit(
        head.id,
        operations,
        commit_message=options.commit_message or COMMIT_MESSAGE,
        revision=options.revision,
        create_pr=options.create_pr,
        parent_commit=None if options.create_pr else head.sha,
    )


def _to_push(folder: Path) -> dict[str, Path | bytes]:
    """By name in the repo, each file or its content without places on this machine; no hidden files, and no links."""
    files: dict[str, Path | bytes] = {}
    links: list[str] = []
    for around, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(around) / name for name in sorted([*folders, *names])):
            name = path.relative_to(folder).as_posix()
            if path.is_symlink():
                links.append(name)
            elif path.is_file() and not path.name.startswith(".") and not name.endswith(ASIDE):
                files[name] = path
    if links:
        logger.warning(f"Links are not followed, and left out: {some_of(links)}.")
    report = without_local(Record.load(folder))
    files[REPORT_NAME] = _json(report.to_dict())
    if PAGE_NAME in files:
        plots = {title: f"{PLOT_FOLDER}/{name}" for title, name in PLOTS.items() if f"{PLOT_FOLDER}/{name}" in files}
        files[PAGE_NAME] = to_markdown(report, plots).encode()
    if HTML_NAME in files:
        files[HTML_NAME] = to_html(report, processor_class(folder)).encode()
    for name, content in files.items():
        if name.endswith("_config.json") and isinstance(content, Path):
            values = json.loads(content.read_text(encoding="utf-8"))
            if "/" in str(values.get("name_or_path", "")):
                files[name] = _json({**values, "name_or_path": without_paths(values["name_or_path"])})
    return files


def _json(values: Any) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def _reason(error: Exception, repo_id: str) -> str:
    """What happened, and what to do, in the words of someone who pushes a model."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, _RefusedError):
        return str(error)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set. Unset it where there is a network."
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token. Log in with `hf auth login`, set HF_TOKEN, or pass `token`."
    if status == 401:
        return f"the Hub does not accept the token ({error}). Log in again with `hf auth login`."
    if status == 403:
        return f"the token may not write there. Use one with write access, or another name than {repo_id}. ({error})"
    if status == 412:
        return "somebody else committed to it meanwhile. Look at what changed, then push again."
    cause = f"{error} ({error.__cause__})" if error.__cause__ else str(error)
    return f"the upload stopped. What has arrived is not sent again. ({type(error).__name__}: {cause})"
