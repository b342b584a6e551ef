"""The Hugging Face hub: fetching what is named and not here; pushing a saved model, when asked to by name and never
otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from raymerge.errors import UserError


class HubError(UserError):
    """A hub that cannot be reached, or a repository that cannot be pushed to; the message says what to do."""


def fetch(what: str, download: Callable[[], str], error: type[UserError]) -> Path:
    """Where a function of huggingface_hub has put what it downloaded, or found in its cache.

    what: how the error names it, with its revision; error: which to raise where it cannot be had.
    """
    try:
        return Path(download())
    except Exception as failure:  # the hub raises its own, OSErrors and its HTTP client's errors, and which has changed
        cause = (str(failure).strip().splitlines() or [""])[0].rstrip(".")
        raise error(
            f"{what} could not be read from the hub: {type(failure).__name__}: {cause}. Check the name and the "
            "network, log in with `hf auth login` if it is gated, give a local path instead, or, if a cache on disk "
            "has it, set HF_HOME to that cache and HF_HUB_OFFLINE=1"
        ) from failure


def check_push(repository: str, *, private: bool = True) -> None:
    """Refuse what `push` would refuse, before anything is computed: no hub, no login, a repository with files, or one
    that is there already and is not as private, or as public, as asked."""
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise HubError(f"--push is {repository!r}, but must be OWNER/NAME, a repository of the Hugging Face hub")
    api = _api()
    try:
        api.whoami()
        exists = api.repo_exists(repository)
        there = set(api.list_repo_files(repository)) if exists else set()
        # The hub creates nothing where a repository exists, so that what is asked for then has no effect.
        is_private = api.repo_info(repository).private is True if exists else private
    except Exception as error:  # the hub raises its own, OSErrors and its HTTP client's errors, and which has changed
        raise _failed(repository, error) from error
    if there - {".gitattributes"}:
        raise HubError(
            f"{repository} exists on the hub and holds {len(there)} files, which are never overwritten: name another"
        )
    if is_private != private:
        is_now, asked = ("private", "public, by --public") if is_private else ("public", "private")
        other = "leave out --public" if is_private else "give --public if everybody may read the model"
        raise HubError(
            f"{repository} exists on the hub and is {is_now}, but the model is to be {asked}: {other}, name another "
            "repository, or change this one's visibility in its settings on the hub"
        )


def push(folder: Path, repository: str, *, private: bool = True) -> str:
    """Upload a saved model as it lies in `folder`, into a new or an empty repository; its address."""
    check_push(repository, private=private)
    api = _api()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository, commit_message="Merged by raymerge")
    except Exception as error:  # as above
        again = f"hf upload {repository} {folder}{' --private' if private else ''}"
        raise _failed(repository, error, f"; the model itself is saved: {again}") from error
    return str(address)


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi()


def _failed(repository: str, error: Exception, further: str = "") -> HubError:
    return HubError(
        f"{repository} could not be pushed to the hub: {type(error).__name__}: {error}. Check the name and the "
        f"network, and log in with `hf auth login`{further}"
    )
