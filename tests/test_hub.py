"""hub.py, without a hub: nothing is pushed unless asked, private unless asked, and never over another model."""

import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from raymerge import cli
from raymerge.alpha_files import alpha_file_text
from raymerge.checkpoint import Checkpoint
from raymerge.hub import HubError, check_push, push
from raymerge.merging import merge
from raymerge.plan import tail_plan


class FakeApi:
    """What HfApi does, on a dict of repositories."""

    repositories: dict = {}
    public: set = set()
    fail: dict = {}
    calls: list = []

    def _called(self, name, **arguments):
        self.calls.append((name, arguments))
        if name in self.fail:
            raise self.fail[name]

    def whoami(self):
        self._called("whoami")
        return {"name": "me"}

    def repo_exists(self, repo_id):
        self._called("repo_exists")
        return repo_id in self.repositories

    def list_repo_files(self, repo_id):
        return self.repositories[repo_id]

    def repo_info(self, repo_id):
        return SimpleNamespace(private=repo_id not in self.public)

    def create_repo(self, repo_id, *, private, exist_ok):
        """A repository that is there stays as it is, whatever `private` says."""
        self._called("create_repo", private=private)
        if repo_id not in self.repositories and not private:
            self.public.add(repo_id)
        self.repositories.setdefault(repo_id, [".gitattributes"])
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, *, folder_path, repo_id, commit_message):
        self._called("upload_folder")
        self.repositories[repo_id] += [path.name for path in folder_path.iterdir()]


@pytest.fixture
def api(monkeypatch):
    monkeypatch.setattr(FakeApi, "repositories", {"me/mine": ["README.md"], "me/empty": [".gitattributes"]})
    monkeypatch.setattr(FakeApi, "public", {"me/empty"})
    monkeypatch.setattr(FakeApi, "fail", {})
    monkeypatch.setattr(FakeApi, "calls", [])
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    return FakeApi


@pytest.fixture
def alphas(tmp_path):
    plan = tail_plan(Checkpoint("demo").n_layers, [0.6], name="one", kind="file")
    (tmp_path / "a.json").write_text(alpha_file_text(plan.steps))
    return tmp_path / "a.json"


def test_nothing_is_pushed_unless_it_is_asked_for(tmp_path, api, alphas):
    assert merge("demo", alphas, tmp_path / "out", verify=False)["pushed"] is None
    assert api.calls == []


@pytest.mark.parametrize(("public", "repository"), [(False, "me/new"), (True, "me/empty")])
def test_what_is_saved_is_pushed_private_unless_public(tmp_path, api, alphas, capsys, public, repository):
    command = ["merge", "demo", "--alphas", str(alphas), "--out", str(tmp_path / "out"), "--no-verify"]
    assert cli.main([*command, "--push", repository, *(["--public"] if public else [])]) == 0
    assert f"Pushed to https://huggingface.co/{repository}" in capsys.readouterr().out
    assert dict(api.calls)["create_repo"] == {"private": not public}
    saved = {path.name for path in (tmp_path / "out").iterdir()}
    assert (repository in api.public) == public
    assert set(api.repositories[repository]) == saved | {".gitattributes"}
    assert {"model.safetensors", "README.md", "merge_plan.json", "mergekit.yaml"} <= saved


def test_public_alone_says_nothing(tmp_path, api, alphas, capsys):
    command = ["merge", "demo", "--alphas", str(alphas), "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--public"]) == 2
    assert "--push OWNER/NAME" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_cannot_be_pushed_is_refused_before_anything_is_computed(tmp_path, api, alphas):
    for repository in ("mine", "a/b/c", "/x", "me/"):
        with pytest.raises(HubError, match="must be OWNER/NAME"):
            merge("demo", alphas, tmp_path / "out", push=repository)
    with pytest.raises(HubError, match="me/mine exists on the hub and holds 1 files, which are never overwritten"):
        merge("demo", alphas, tmp_path / "out", push="me/mine")
    assert not (tmp_path / "out").exists() and "create_repo" not in dict(api.calls)


def test_an_existing_repository_is_as_private_as_asked_or_refused(tmp_path, api, alphas):
    with pytest.raises(HubError, match="me/empty exists on the hub and is public, .* to be private: give --public if"):
        merge("demo", alphas, tmp_path / "out", push="me/empty")
    api.public.clear()
    with pytest.raises(HubError, match="me/empty exists on the hub and is private, .*: leave out --public, name"):
        merge("demo", alphas, tmp_path / "out", push="me/empty", private=False)
    assert not (tmp_path / "out").exists()
    # Made public while the model was merged: asked again before the upload.
    api.public.add("me/empty")
    with pytest.raises(HubError, match="is public"):
        push(tmp_path, "me/empty")
    assert not {"create_repo", "upload_folder"} & set(dict(api.calls))


def test_a_new_repository_may_be_either(api):
    for private in (True, False):
        check_push("me/new", private=private)


@pytest.mark.parametrize(
    "error", [ConnectionResetError("reset by peer"), LocalTokenNotFoundError("no token"), OSError("offline mode")]
)
def test_an_unreachable_hub_reads_well(api, error):
    api.fail["whoami"] = error
    with pytest.raises(
        HubError, match=f"me/new could not be pushed to the hub: {type(error).__name__}: {error}.*login"
    ):
        check_push("me/new")


def test_offline_for_real(monkeypatch):
    client = sys.modules[next(c.__module__ for c in HfHubHTTPError.__mro__ if c.__name__ == "HTTPError").split(".")[0]]

    def refuse(*_, **__):
        raise client.ConnectError("Name or service not known")

    monkeypatch.setattr(client.Client, "send", refuse)
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    with pytest.raises(HubError, match="could not be pushed to the hub: .*Check the name and the network"):
        check_push("me/new")


def test_an_upload_that_breaks_off_leaves_the_model_and_says_how_to_go_on(tmp_path, api, alphas):
    api.fail["upload_folder"] = OSError("broken pipe")
    again = f"hf upload me/new {tmp_path}/out --private$"  # which makes a repository that is not there
    with pytest.raises(HubError, match=f"broken pipe.*the model itself is saved: {again}"):
        merge("demo", alphas, tmp_path / "out", verify=False, push="me/new")
    assert Checkpoint(str(tmp_path / "out")).n_layers == Checkpoint("demo").n_layers - 1
    api.fail.clear()
    assert push(tmp_path / "out", "me/new") == "https://huggingface.co/me/new"
