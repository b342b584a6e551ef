"""Pushing a saved model to the Hugging Face hub, when asked to by name and never otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raymerge.errors import UserError


class HubError(UserError):
    """A hub that cannot be reached, or a repository that cannot be pushed to; the message says what to do."""


def check_push(repository: str) -> None:
    """Refuse what `push` would refuse, before anything is computed: no hub, no login, a repository with files."""
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise HubError(f"--push is {repository!r}, but must be OWNER/NAME, a repository of the Hugging Face hub")
    api = _api()
    try:
        api.whoami()
        there = set(api.list_repo_files(repository)) if api.repo_exists(repository) else set()
    except Exception as error:  # the hub raises its own, OSErrors and its HTTP client's errors, and which has changed
        raise _failed(repository, error) from error
    if there - {".gitattributes"}:
        raise HubError(
            f"{repository} exists on the hub and holds {len(there)} files, which are never overwritten: name another"
        )


def push(folder: Path, repository: str, *, private: bool = True) -> str:
    """Upload a saved model as it lies in `folder`, into a new or an empty repository; its address."""
    check_push(repository)
    api = _api()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository, commit_message="Merged by raymerge")
    except Exception as error:  # as above
        raise _failed(repository, error, f"; the model itself is saved: hf upload {repository} {folder}") from error
    return str(address)


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi()


def _failed(repository: str, error: Exception, further: str = "") -> HubError:
    return HubError(
        f"{repository} could not be pushed to the hub: {type(error).__name__}: {error}. Check the name and the "
        f"network, and log in with `hf auth login`{further}"
    )
