"""The command line: help that teaches, and wrong inputs that get one readable line and leave nothing behind."""

import csv
import errno
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from docs_blocks import check_command

from raymerge import __main__, cli, demo
from raymerge.arguments import parser
from raymerge.checkpoint import Checkpoint
from raymerge.config import CalibrationConfig, DataConfig, PlanConfig
from raymerge.config_file import parse_config
from raymerge.domains import CATEGORY_OF, known_domains
from raymerge.plan import Refit

COMMANDS = [
    [],
    *([name] for name in "search similarity sensitivity sweep import-similarity evaluate merge config".split()),
]
N_LAYERS = json.loads((demo.MODEL_PATH / "config.json").read_text())["num_hidden_layers"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    assert stop.value.code == 0
    assert "usage: raymerge" in capsys.readouterr().out


def test_help_names_configurations_that_there_are(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            cli.main([*command, "--help"])
    root = Path(__file__).parents[1]
    named = set(re.findall(r"jobs/configs/[\w.-]+\.yaml", capsys.readouterr().out))
    assert named and [name for name in sorted(named) if not (root / name).is_file()] == []


@pytest.mark.parametrize("command", [*COMMANDS, ["report"]])
def test_examples_in_help_parse_and_name_subjects_that_there_are(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([*command, "--help"])
    known = {*known_domains(), *CATEGORY_OF}
    _, _, examples = capsys.readouterr().out.partition("example")
    lines = examples.replace("\\\n", " ").splitlines()
    for words in (shlex.split(line) for line in lines if line.startswith("  raymerge ")):
        check_command(words, where=shlex.join(words))
        subjects = getattr(parser().parse_args(words[1:]), "subjects", None)
        assert subjects is None or set(subjects.split(",")) <= known, words


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "raymerge", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("raymerge ")


@pytest.mark.parametrize("where", ["while it is imported", "a second time"])
def test_an_interrupt_that_the_command_line_cannot_see_to_leaves_no_trace(where, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    if where == "a second time":
        monkeypatch.setattr(cli, "main", interrupted)
    else:
        monkeypatch.delitem(sys.modules, "raymerge.cli")
        monkeypatch.setattr(sys, "meta_path", [SimpleNamespace(find_spec=interrupted), *sys.meta_path])
    assert __main__.main(["config"]) == 130
    assert capsys.readouterr().err == "raymerge: interrupted\n"


def test_help_does_not_import_torch_or_ray():
    code = (
        "import sys; from raymerge import cli; cli.parser(); print([m for m in ('torch', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_libraries_that_are_imported_by_the_way_say_nothing():
    """torchao, where it is installed, warns of every kernel that is not for this machine."""
    pytest.importorskip("torchao")
    code = "from raymerge import cli; cli._quiet_libraries(); import transformers.integrations.torchao"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def test_a_stop_ends_a_process_whose_error_output_nobody_reads():
    """Where a shell or a log is gone, the message raises; it must not keep the process going."""
    code = (
        "import os, signal, time; from raymerge import cli; signal.signal(signal.SIGTERM, cli._stop); os.close(2)\n"
        "try: os.kill(os.getpid(), signal.SIGTERM); time.sleep(10)\n"
        "except OSError: print('goes on')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (143, "")


def test_a_stopped_command_gives_the_terminal_its_cursor_back():
    """The process ends at once, so that what draws the bars has no time to."""
    code = "import os, signal; from raymerge import cli; cli._stop(signal.SIGTERM, None)"
    ours, theirs = pty.openpty()
    ended = subprocess.run([sys.executable, "-c", code], stderr=theirs, timeout=60)
    shown = os.read(ours, 1000)
    for end in (ours, theirs):
        os.close(end)
    assert ended.returncode == 143
    assert shown.startswith(b"\x1b[?25h\r\nraymerge: stopped; the same command again")
    piped = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, timeout=60)
    assert piped.stderr.startswith(b"raymerge: stopped;")


def test_ctrl_c_once_more_while_python_ends_shows_no_trace():
    """Ray ends its processes there."""
    code = (
        "import atexit, os, signal, sys; from raymerge import __main__, cli\n"
        "def interrupted(_): raise KeyboardInterrupt\n"
        "atexit.register(lambda: [os.kill(os.getpid(), signal.SIGINT), print('ended')])\n"
        "cli._show_config = interrupted; sys.exit(__main__.main(['config']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (130, "ended\n")
    assert done.stderr == f"raymerge: interrupted; {cli._STOPPED}\n"


def test_a_closed_terminal_stops_a_command_unless_nohup_keeps_it():
    code = (
        "import os, signal, sys; from raymerge import cli\n"
        "cli._show_config = lambda _: os.kill(os.getpid(), signal.SIGHUP) or 0\n"
        "sys.exit(cli.main(['config']))"
    )
    as_usual = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL); {code}"  # the tests may run under nohup
    ended = subprocess.run([sys.executable, "-c", as_usual], stderr=subprocess.PIPE, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (129, f"raymerge: stopped; {cli._STOPPED}\n")
    kept = subprocess.run(["nohup", sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (kept.returncode, kept.stdout, kept.stderr) == (0, "", "")


def test_a_reader_that_has_seen_enough_is_no_error():
    """As in `raymerge config | head -1`."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "raymerge", "config"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_broken_pipe_of_something_else_is_a_bug(monkeypatch):
    def broken(_):
        raise BrokenPipeError("a subprocess's")

    monkeypatch.setattr(cli, "_show_config", broken)
    with pytest.raises(BrokenPipeError, match="a subprocess's"):
        cli.main(["config"])


def test_a_log_on_a_full_disk_is_no_bug():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "raymerge", "config"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2
    assert re.fullmatch(
        r"raymerge: what the command says cannot be written: No space left on device; free space .*\n", done.stderr
    )


def test_a_full_disk_of_something_else_that_nobody_has_named_is_a_bug(monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "of something else")

    monkeypatch.setattr(cli, "_show_config", full)
    with pytest.raises(OSError, match="of something else"):
        cli.main(["config"])


def test_a_working_folder_that_was_deleted_is_said(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    code = f"import os, sys; from raymerge import cli; os.rmdir({str(gone)!r}); sys.exit(cli.main(['report', 'x']))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=gone,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    said = "raymerge: the folder that the command was called in is not there any more: cd to another\n"
    assert (done.returncode, done.stderr) == (2, said)


def test_a_user_without_a_home_is_told_so(monkeypatch, capsys):
    """Where Ray's import, and the cache of GGUF files, would end in a trace."""
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda _: {}["no such user"])
    assert cli.main(["report", "x"]) == 2
    assert re.fullmatch(r"raymerge: user \d+ has no home folder: set HOME to .*\n", capsys.readouterr().err)


def test_the_printed_configuration_is_a_configuration(capsys):
    assert cli.main(["config", "--set", "plan.merges=4"]) == 0
    values = yaml.safe_load(capsys.readouterr().out)
    config = parse_config(values, source="printed")
    assert config.plan.merges == 4
    assert config.resolved() == values


def _mmlu(folder, *, dev=5, row=("What?", "a", "b", "c", "d", "A")):
    for split, count in (("dev", dev), ("val", 3), ("test", 3)):
        (folder / split).mkdir(parents=True)
        with (folder / split / f"anatomy_{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([row if i == 0 else ("Q", "a", "b", "c", "d", "B") for i in range(count)])
    return folder


def _alphas(path, steps):
    entries = [{"step": 0, "layer_to_merge_into": i, "layer_to_remove": j, "ratio_i_alpha": a} for i, j, a in steps]
    path.write_text(json.dumps(entries))
    return path


def _refused(arguments, capsys, out, *words):
    """Exit code 2, one line with all the words at the end of stderr, nothing written."""
    assert cli.main([str(a) for a in arguments]) == 2
    error = capsys.readouterr().err.strip()
    error = error[error.rfind("raymerge: ") :]  # after lines of progress, where the machine is slow
    assert error.startswith("raymerge: ") and "Traceback" not in error
    for word in words:
        assert word in error
    assert not out.exists()


def test_wrong_inputs_of_a_search_leave_nothing_half_written(tmp_path, capsys):
    out = tmp_path / "run"
    search = ["search", "--out", out]
    (tmp_path / "empty").mkdir()
    missing_dev = _mmlu(tmp_path / "few", dev=2)
    short_row = _mmlu(tmp_path / "short", row=("What?", "a", "b", "c", "A"))
    cases = [
        (["search", tmp_path / "none.yaml", "--out", out], ["none.yaml", "jobs/configs"]),
        ([*search, "--set", "plan.mergs=4"], ["plan.mergs", "merges"]),
        ([*search, "--set", f"data.mmlu={tmp_path / 'missing'}"], ["missing"]),
        ([*search, "--set", f"data.mmlu={tmp_path / 'empty'}"], ["empty"]),
        ([*search, "--set", f"data.mmlu={missing_dev}"], ["anatomy", "2", "5"]),
        ([*search, "--set", f"data.mmlu={short_row}"], ["anatomy", "line 1"]),
        ([*search, "--set", f"plan.merges={N_LAYERS}"], [f"{N_LAYERS}", f"1 to {N_LAYERS - 1}"]),
        ([*search, "--set", "plan.ratio=1.5"], ["plan.ratio", "1.5"]),
        ([*search, "--set", f"model.path={tmp_path / 'nowhere'}"], ["nowhere", "hub id"]),
        ([*search, "--set", "data.perplexity_text=/no/such/text"], ["/no/such/text"]),
        ([*search, "--set", "search.objective=accuracy:anatomy"], ["anatomy"]),
        ([*search, "--set", "data.search_split=test"], ["search_on_test"]),
    ]
    for arguments, words in cases:
        _refused(arguments, capsys, out, *words)


def test_wrong_alpha_files_are_refused_by_search_and_merge(tmp_path, capsys):
    out = tmp_path / "out"
    last = N_LAYERS - 1
    cases = {
        "outside.json": ([(last - 1, last, 1.2)], ["1.2", "[0, 1]"]),
        "broken_chain.json": ([(last - 1, last, 0.5), (last - 1, last, 0.5)], ["already removed"]),
        "apart.json": ([(last - 3, last, 0.5)], ["neighbours"]),
        "too_deep.json": ([(40, 41, 0.5)], ["does not exist", f"0 to {last}"]),
    }
    for name, (steps, words) in cases.items():
        path = _alphas(tmp_path / name, steps)
        _refused(["merge", "demo", "--alphas", path, "--out", out], capsys, out, name, *words)
        _refused(
            ["search", "--out", out, "--set", "plan.base=file", "--set", f"plan.alpha_file={path}"],
            capsys,
            out,
            name,
            *words,
        )


def test_options_of_a_refit_that_is_not_asked_for_are_refused_rather_than_left_aside(tmp_path, capsys):
    path, out = _alphas(tmp_path / "x.json", [(N_LAYERS - 2, N_LAYERS - 1, 0.5)]), tmp_path / "out"
    command = ["merge", "demo", "--alphas", path, "--out", out]
    _refused(
        [*command, "--calibration", "demo"],
        capsys,
        out,
        "--calibration is of a refit, or of a block",
        "neither is asked",
    )
    _refused([*command, "--refit-layers", "2"], capsys, out, "--refit-layers is of --refit, which is not given")


def test_an_unknown_architecture_is_named_with_those_that_work(tmp_path, capsys):
    model = tmp_path / "model"
    model.mkdir()
    values = json.loads((demo.MODEL_PATH / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps({**values, "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})
    )
    out = tmp_path / "out"
    _refused(["evaluate", model, "--out", out], capsys, out, "gpt2", "llama")


def test_an_unreachable_hub_says_what_to_do(tmp_path, capsys, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(*_, **__):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    out = tmp_path / "out"
    _refused(["evaluate", "owner/model", "--out", out], capsys, out, "owner/model", "no connection", "local folder")


def test_merge_writes_a_checkpoint_that_evaluates_like_any_other(tmp_path, capsys):
    alphas = _alphas(tmp_path / "a.json", [(N_LAYERS - 2, N_LAYERS - 1, 0.6)])
    assert cli.main(["merge", "demo", "--alphas", str(alphas), "--out", str(tmp_path / "merged")]) == 0
    out = capsys.readouterr().out
    assert f"{N_LAYERS} layers became {N_LAYERS - 1}" in out
    assert "Reloaded in a fresh process: logits within " in out and "8 tokens generated" in out
    assert Checkpoint(str(tmp_path / "merged")).n_layers == N_LAYERS - 1


def test_the_reference_page_is_of_all_keys_and_takes_no_configuration(capsys):
    assert cli.main(["config", "--markdown"]) == 0
    assert "| `plan.merges` | integer ≥ 1 or null | `13` |" in capsys.readouterr().out
    assert cli.main(["config", "--markdown", "--set", "plan.merges=4"]) == 2
    assert "--markdown" in capsys.readouterr().err


def test_paths_and_names_mean_what_they_say_not_what_yaml_would_read(tmp_path, capsys, monkeypatch):
    """A # would begin a comment, 2024 be a number and no a truth: a run went to another folder without a word."""
    from raymerge import experiments

    asked = []

    class Reached(Exception):
        pass

    def reached(config, **_):
        asked.append(config)
        raise Reached

    monkeypatch.setattr(experiments, "evaluate", reached)
    monkeypatch.setattr(experiments, "search", reached)
    model, text, out = "models/my model #2: x", "book #1.txt", "runs/2024 #3"
    with pytest.raises(Reached):
        cli.main(["evaluate", model, "--text", text, "--mmlu", "1e3", "--language", "no", "--out", out])
    with pytest.raises(Reached):
        cli.main(["evaluate", "demo", "--text", "none", "--mmlu", "null", "--out", "über 😀"])
    with pytest.raises(Reached):
        cli.main(["search", "--out", "2024"])
    first, second, third = asked
    assert (first.model.path, first.data.perplexity_text, first.output.run) == (model, text, out)
    assert (first.data.mmlu, first.data.language) == ("1e3", "no")
    assert (second.data.perplexity_text, second.data.mmlu, second.output.run) == (None, None, "über 😀")
    assert third.output.run == "2024"


def test_a_file_is_not_overridden_by_options_that_are_not_given(tmp_path, monkeypatch):
    from raymerge import experiments

    asked = []
    monkeypatch.setattr(experiments, "evaluate", lambda config, **_: asked.append(config.data) or sys.exit(0))

    def data(*words):
        with pytest.raises(SystemExit):
            cli.main(["evaluate", "demo", "--out", "run", *words])
        return asked[-1]

    own = {"mmlu": None, "language": "de", "subjects": ["anatomy"], "shots": 2, "report_split": "validation"}
    own |= {"perplexity_text": "a.txt", "report_limit_per_subject": 3, "question_perplexity": False}
    (tmp_path / "own.yaml").write_text(json.dumps({"data": own}))
    file = ["--config", str(tmp_path / "own.yaml")]
    assert {key: getattr(data(*file), key) for key in own} == own
    assert data(*file, "--shots", "0").shots == 0 and data(*file, "--mmlu", "demo").mmlu == "demo"
    assert data(*file, "--question-perplexity").question_perplexity
    assert data() == DataConfig(question_perplexity=True)
    assert data("--no-question-perplexity") == DataConfig() == data("--set", "data.question_perplexity=false")


def test_options_of_an_evaluation_are_of_the_report(monkeypatch):
    """A limit and a split of the search would be of no effect. Options win over --set, as --out does in a search."""
    from raymerge import experiments

    asked = []
    monkeypatch.setattr(experiments, "evaluate", lambda config, **_: asked.append(config) or sys.exit(0))
    words = ["--limit", "7", "--split", "validation", "--subjects", "law,anatomy", "--shots", "3"]
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "demo", "--out", "run", *words, "--set", "data.shots=2", "--set", "output.run=other"])
    (config,) = asked
    assert config.output.run == "run"
    expected = DataConfig(report_limit_per_subject=7, report_split="validation", subjects="law,anatomy", shots=3,
                          question_perplexity=True)  # fmt: skip
    assert config.data == expected


def test_a_merge_does_what_its_options_say_and_says_what_was_done(monkeypatch, capsys):
    from raymerge import merging

    asked, done = [], {
        "layers_before": 21, "layers_after": 17, "parameters": 15_440_000, "parameters_removed": 4_560_000,
        "tensors_changed": 9,
        "largest_relative_change": 0.1234, "bytes": 2_500_000, "folder": "merged", "plan_id": "p1", "proof": None,
        "mergekit": None, "pushed": None,
    }  # fmt: skip

    def merge(*words, **options):
        asked.append((words, options))
        return done

    def said(*words):
        assert cli.main(["merge", "demo", "--alphas", "a.json", "--out", "merged", *words]) == 0
        return capsys.readouterr().out

    monkeypatch.setattr(merging, "merge", merge)
    text = said()
    assert text.splitlines() == [
        "21 layers became 17; 4.56 M parameters removed, 22.8 %; 9 tensors differ from the base's of the same name, by "
        "at most 12.3 % of their norm.",
        "Saved 2.5 MB in merged (plan p1, merge_plan.json).",
    ]
    plain = {"revision": None, "trust_remote_code": False, "alignment": None, "norms": None, "biases": None,
             "refit": None, "calibration": None, "verify": True, "push": None, "private": True}  # fmt: skip
    words, options = asked[-1]
    assert words == ("demo", "a.json", "merged") and plain == {key: options.get(key) for key in plain}
    done |= {"mergekit": "it has no terms", "pushed": "https://hub/me/m"}
    text = said(
        *("--revision", "v2", "--trust-remote-code", "--alignment", "rows", "--norms", "fold", "--biases", "merge"),
        *("--refit", "outputs", "--refit-layers", "2", "--calibration", "demo", "--no-verify"),
        *("--push", "me/m", "--public"),
    )
    assert text.splitlines()[2:] == ["No mergekit.yaml: it has no terms.", "Pushed to https://hub/me/m."]
    other = {"revision": "v2", "trust_remote_code": True, "alignment": "rows", "norms": "fold", "biases": "merge",
             "refit": Refit("outputs", layers=2), "calibration": CalibrationConfig(text="demo"), "verify": False,
             "push": "me/m", "private": False}  # fmt: skip
    assert other.items() <= asked[-1][1].items()
    assert "Pushed" in said("--push", "me/m") and asked[-1][1]["private"] is True
    count = len(asked)
    for words, cure in (
        (["--public"], "--push OWNER/NAME is not given"),
        (["--refit-layers", "1"], "--refit-layers is"),
        (["--refit", "linear", "--calibration-tokens", "9"], "--calibration-tokens is of --calibration, which is not"),
        (["--calibration", "demo", "--calibration-tokens", "1"], "calibration.tokens = 1: Input should be greater"),
    ):
        assert cli.main(["merge", "demo", "--alphas", "a.json", "--out", "merged", *words]) == 2
        assert cure in capsys.readouterr().err and len(asked) == count
    assert cli.main(["merge", "demo", "--plan", "p.json", "--out", "merged"]) == 0
    words, options = asked[-1]
    assert words == ("demo", "p.json", "merged") and plain == {key: options.get(key) for key in plain}
    by_loss = ["--set", "plan.merges=4", "--set", "plan.selection=block", "--set", "plan.block=loss"]
    assert cli.main(["merge", "demo", *by_loss, "--out", "merged"]) == 0
    (model, section, out), options = asked[-1]
    assert (model, out) == ("demo", "merged") and plain == {key: options.get(key) for key in plain}
    assert section == PlanConfig(merges=4, selection="block", block="loss")
    count = len(asked)
    for words, cure in (
        (["--set", "plan.mergs=4"], "plan.mergs: did you mean merges?"),
        (["--set", "plan.merges=4", "--set", "search.candidates=2"], "--set search.candidates=2: a merge has the keys"),
        (["--set", "plan.selection=block", "--set", "plan.merges=null"], "selection is block, which needs merges"),
    ):
        assert cli.main(["merge", "demo", *words, "--out", "merged"]) == 2
        assert cure in capsys.readouterr().err and len(asked) == count
    # Options beside a section are its keys: what they leave open of a refit is the section's.
    ridge, fit = ["--set", "plan.merges=2", "--set", "plan.ridge=0.5"], ["--set", "plan.refit=units"]
    for words, expected in (
        ([*ridge, "--refit", "outputs", "--norms", "fold"], {"ridge": 0.5, "refit": "outputs", "norms": "fold"}),
        ([*ridge, *fit, "--refit-layers", "1"], {"ridge": 0.5, "refit": "units", "refit_layers": 1}),
        (["--set", "plan.merges=2", *fit, "--refit", "none"], {"refit": "none"}),
    ):
        assert cli.main(["merge", "demo", *words, "--calibration", "demo", "--out", "merged"]) == 0
        (_, section, _), options = asked[-1]
        assert section == PlanConfig(merges=2, **expected)
        assert plain | {"calibration": CalibrationConfig(text="demo")} == {key: options.get(key) for key in plain}
    fit = ["--alphas", "a.json", "--refit", "linear", "--calibration", "a.txt", "--calibration-tokens", "300"]
    assert cli.main(["merge", "demo", *fit, "--out", "merged"]) == 0
    assert asked[-1][1]["calibration"] == CalibrationConfig(text="a.txt", tokens=300)
    for words in (["--plan", ""], ["--alphas", ""]):  # as of a variable of the shell that has no value
        assert cli.main(["merge", "demo", *words, "--out", "merged"]) == 0
        assert asked[-1][0] == ("demo", "", "merged")
    for words in (["--plan", "p.json", "--alphas", "a.json"], ["--plan", "p.json", "--set", "plan.merges=4"], []):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["merge", "demo", *words, "--out", "merged"])


@pytest.mark.parametrize(
    "settings, said",
    [
        (["merges=4", "block=11"], "plan.block is of plan.selection=block"),
        (["merges=4", "starts=[1]"], "plan.starts is of plan.selection=block"),
        (["merges=4", "survivor=after"], "plan.survivor is of plan.selection=block"),
        (["merges=4", "selection=block", "block=3", "starts=[5]"], "plan.starts is of a block that is chosen"),
        (["merges=4", "selection=list", "base=file", "alpha_file=a"], "plan.merges is of a selection but list"),
        (["merges=4", "ratio=1", "base=similarity", "similarity_run=r"], "plan.ratio is of plan.base=fixed"),
        (["merges=4", "beta=2", "base=similarity", "similarity_run=r"], "plan.beta is of plan.base=similarity_ratio"),
        (["merges=4", "alpha_file=a.json"], "plan.alpha_file is of plan.base=file"),
        (["merges=4", "similarity_run=r"], "plan.similarity_run is of a base, a selection or a block by similarity"),
        (["merges=4", "similarity_subset=law"], "plan.similarity_subset is of a base"),
        (["merges=4", "ridge=1"], "plan.ridge is of plan.refit"),
        (["merges=4", "selection=block", "block=similarity", "similarity_run=r", "similarity_subset=s"], None),
        (["merges=4", "selection=most_similar", "similarity_run=r", "threshold=0.5"], None),
        (["selection=list", "base=file", "alpha_file=a"], None),
        (["merges=4", "refit=units", "ridge=1", "refit_layers=1", "ratio=0.5"], None),
    ],
)
def test_keys_of_a_section_that_change_nothing_of_a_merge_are_refused(monkeypatch, capsys, settings, said):
    asked = []
    monkeypatch.setattr("raymerge.merging.merge", lambda *words, **_: asked.append(words) or sys.exit(0))
    words = [word for setting in settings for word in ("--set", f"plan.{setting}")]
    if said is None:
        with pytest.raises(SystemExit):
            cli.main(["merge", "demo", *words, "--out", "merged"])
        assert asked
        return
    assert cli.main(["merge", "demo", *words, "--out", "merged"]) == 2
    assert f"raymerge: {said}" in (told := capsys.readouterr().err) and not asked
    assert told.endswith("not asked for: the model would be the same without it\n")


@pytest.mark.parametrize("command", [["search"], ["sweep"], ["similarity"], ["evaluate", "demo"]])
def test_a_job_writes_where_it_lasts(monkeypatch, capsys, command):
    """A job's folder is Ray's copy of the project. An option --out goes before --set of the same key."""
    from raymerge import experiments

    asked = []
    for name in ("search", "sweep", "similarity", "evaluate"):
        monkeypatch.setattr(experiments, name, lambda config, **_: asked.append(config.output.run) or sys.exit(0))

    def runs(out, *settings):
        try:
            return cli.main([*command, "--set", "output.run=x", "--out", out, *settings])
        except SystemExit:
            return asked.pop() == out

    assert runs("runs/a") is True
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert runs("runs/a") == 2 and not asked and "Ray's temporary copy of the project" in capsys.readouterr().err
    assert all(runs(out) is True for out in ("/shared/a", "~/a", "s3://bucket/a"))
    assert runs("/shared/a", "--set", "output.cache=/disk") is True
    assert runs("/shared/a", "--set", "output.cache=states") == 2 and not asked
    assert "output.cache is 'states', a folder in Ray's temporary copy of the project" in capsys.readouterr().err


def test_a_refusal_shows_no_key_that_a_uri_holds(capsys):
    """Everyone who may look at a cluster reads its jobs' logs."""
    assert cli.main(["evaluate", "demo", "--out", "nowhere://AKIA:hunter2@bucket/run?token=hunter3"]) == 2
    said = capsys.readouterr().err
    assert "://***@bucket/run" in said and "hunter" not in said


def test_what_a_command_does_to_signals_ends_with_it(monkeypatch):
    """Called from Python, as notebooks do."""
    during, own = [], lambda *_: None
    before = {number: signal.signal(number, own) for number in (signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.setattr(cli, "_show_config", lambda _: during.append(signal.getsignal(signal.SIGTERM)) or 0)
    try:
        assert cli.main(["config"]) == 0
        assert during == [cli._stop] and all(signal.getsignal(number) is own for number in before)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_an_error_of_no_file_keeps_its_trace(monkeypatch):
    def barred(_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(cli, "_show_config", barred)
    with pytest.raises(PermissionError):
        cli.main(["config"])


@pytest.mark.parametrize("command", [["search"], ["evaluate", "demo"]])
def test_an_empty_folder_name_is_refused_and_not_the_default(command, capsys):
    assert cli.main([*command, "--out", ""]) == 2
    assert "output.run = '': it is empty, as when a script's variable is not set" in capsys.readouterr().err


LONG = "[" + 300 * "x" + "]"  # as the content of a file in place of its name


@pytest.mark.parametrize(
    "command",
    [
        ["merge", "demo", "--alphas", LONG, "--out", "merged"],
        ["evaluate", LONG, "--out", "run"],
        ["evaluate", "demo", "--mmlu", LONG, "--out", "run"],
    ],
)
def test_paths_that_cannot_be_looked_at_are_named_without_a_trace(command, tmp_path, monkeypatch, capsys):
    """So are those in folders of other users, which a test that root runs cannot have."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(command) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("raymerge: ") and f"{LONG} cannot be opened: File name too long; check the path" in said


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "{}", "--out", "run"],
        ["evaluate", "demo", "--out", "{}"],
        ["evaluate", "demo", "--mmlu", "{}", "--out", "run"],
        ["search", "--set", "model.path={}"],
        ["search", "{}"],
        ["merge", "{}", "--alphas", "a.json", "--out", "merged"],
        ["report", "{}"],
    ],
)
def test_names_that_are_not_utf_8_are_refused_in_a_line(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = b"m\xff".decode(errors="surrogateescape")  # as Python gives the bytes of a command line
    assert cli.main([word.format(name) for word in command]) == 2
    assert "\\udcff' is not UTF-8: rename what it names" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
