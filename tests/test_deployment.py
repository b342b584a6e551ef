"""cluster.yaml, the KubeRay manifest and jobs/: what they name exists, and Ray's own checks accept them."""

import ast
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from raymerge.arguments import parser
from raymerge.config_file import load_config

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "search_alphas": "search",
    "layer_similarity": "similarity",
    "similarity_sensitivity": "sensitivity",
    "compression_sweep": "sweep",
    "evaluate": "evaluate",
    "merge": "merge",
}


def read_all(path):
    return list(yaml.safe_load_all((ROOT / path).read_text(encoding="utf-8")))


def check_command(text):
    """A job's command line: its script and configuration exist and its overrides are options."""
    words = shlex.split(text)
    assert words[0] == "python"
    script, config = (Path(word.removeprefix("/app/")) for word in words[1:3])
    assert script.stem in COMMANDS and (ROOT / script).is_file() and (ROOT / config).is_file()
    options = parser().parse_args([COMMANDS[script.stem], str(ROOT / config), *words[3:]])
    return options, load_config(options.config, options.set)


def test_the_cluster_is_accepted_by_rays_own_schema():
    from ray.autoscaler._private.util import prepare_config, validate_config

    (config,) = read_all("cluster.yaml")
    prepared = prepare_config(config)
    validate_config(prepared)
    workers = prepared["available_node_types"]["gpu_worker"]
    assert workers["min_workers"] == 0 < workers["max_workers"] <= prepared["max_workers"]
    assert prepared["available_node_types"]["head"]["resources"]["CPU"] == 0
    with pytest.raises(Exception, match="max_worker"):
        validate_config(prepared | {"max_wokers": 3, "max_workers": "many"})


def test_the_cluster_exposes_nothing_and_mounts_what_is_there():
    (config,) = read_all("cluster.yaml")
    (head,) = (line for line in config["head_start_ray_commands"] if "--head" in line)
    assert "--dashboard-host=127.0.0.1" in head
    mounts = config["file_mounts"]
    assert mounts.pop("/home/ubuntu/.ray/auth_token") == "~/.ray/auth_token", "where Ray looks for it on both sides"
    assert all((ROOT / source).is_file() for source in mounts.values())


def test_no_machine_starts_ray_without_token_authentication():
    """Ray's own default is to go on without where it finds no token, for anybody's jobs."""
    (config,) = read_all("cluster.yaml")
    starts = [line for kind in ("head", "worker") for line in config[f"{kind}_start_ray_commands"] if "start" in line]
    assert len(starts) == 2 and all("export RAY_AUTH_MODE=token; ray start " in line for line in starts)
    job, _ = read_all("docs/kuberay.yaml")
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_ray_start_refuses_to_go_on_without_the_token_that_is_asked_for(tmp_path):
    """What the cluster's commands rely on; the same line with the token would start a head."""
    done = subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--port=0", "--include-dashboard=false"],
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "RAY_AUTH_MODE": "token"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "no authentication token was found" in done.stderr


def test_the_command_in_the_clusters_head_runs_on_it():
    text = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
    comment = " ".join(line.removeprefix("#").strip(" \\") for line in text.splitlines() if line.startswith("#"))
    command = comment.partition("-- ")[2].partition(" ray down")[0]
    options, config = check_command(command)
    assert options.out.startswith("s3://") and config.workers.autoscaling and config.workers.count == 8


def test_the_rayjob_runs_a_real_entry_point_on_a_consistent_cluster():
    job, claim = read_all("docs/kuberay.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    options, config = check_command(job["spec"]["entrypoint"])
    spec = job["spec"]["rayClusterSpec"]
    (group,) = spec["workerGroupSpecs"]
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert config.workers.count == group["maxReplicas"] and config.workers.autoscaling
    for template in (spec["headGroupSpec"]["template"], group["template"]):
        (container,), (volume,) = template["spec"]["containers"], template["spec"]["volumes"]
        (mount,) = container["volumeMounts"]
        assert mount["name"] == volume["name"] and options.out.startswith(mount["mountPath"])
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == str(config.workers.gpus_per_worker)[0]


def test_every_experiment_has_an_entry_point_that_its_docstring_shows():
    assert {path.stem for path in (ROOT / "jobs").glob("*.py")} == {*COMMANDS, "entry"}
    for name, command in COMMANDS.items():
        tree = ast.parse((ROOT / f"jobs/{name}.py").read_text(encoding="utf-8"))
        assert f"-- python jobs/{name}.py " in ast.get_docstring(tree)
        assert f"run('{command}')" in ast.unparse(tree)


def test_an_entry_point_runs_without_an_installation_and_gives_the_commands_exit_code(tmp_path):
    """-I and another folder: only what the script itself puts on the path is found."""

    def run(name, *arguments, **environment):
        return subprocess.run(
            [sys.executable, "-P", ROOT / f"jobs/{name}.py", *arguments],
            cwd=tmp_path,
            env={"PATH": "", "PYTHONPATH": str(ROOT / "jobs"), **environment},
            capture_output=True,
            text=True,
        )

    unknown = run("evaluate", "demo", "--out", tmp_path / "run", "--set", "data.subjets=anatomy")
    assert unknown.returncode == 2 and "did you mean subjects" in unknown.stderr
    relative = run("evaluate", "demo", "--out", "run", RAY_JOB_CONFIG_JSON_ENV_VAR="{}")
    assert relative.returncode == 2 and "temporary copy of the project" in relative.stderr
    assert list(tmp_path.iterdir()) == []
