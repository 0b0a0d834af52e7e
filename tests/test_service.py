"""The worker as a service of the system, and the program as `uv`, `pipx` and `pip install` run it."""

from __future__ import annotations

import argparse
import dataclasses
import os
import plistlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import harness
import pytest

import qmesh

README = (harness.ROOT / "README.md").read_text("utf-8")
PROJECT = tomllib.loads((harness.ROOT / "pyproject.toml").read_text("utf-8"))
AWKWARD = r"a b%c$d${e}\"f' ü;"  # what some system or other reads as its own
KINDS = ("systemd", "launchd", "windows")
TASK = {"task": qmesh.TASK_NAMESPACE}


@pytest.fixture
def place(tmp_path: Path) -> harness.Mesh:
    return harness.Mesh(tmp_path, Path("none"))


def printed(place: harness.Mesh, kind: str, *flags: str, env: dict[str, str] | None = None) -> str:
    finished = place.run("worker", "--print-service", kind, *flags, env=env)
    assert finished.returncode == 0, finished.stderr
    assert "Traceback" not in finished.stderr
    return finished.stdout


def settings_of(unit: str) -> dict[str, list[str]]:
    """The assignments of a unit for systemd."""
    found: dict[str, list[str]] = {}
    for name, value in re.findall(r"^(\w+)=(.*)$", unit, re.MULTILINE):
        found.setdefault(name, []).append(value)
    return found


def systemd_words(line: str) -> list[str]:
    """The words of a line as systemd.syntax(7) and systemd.service(5) read it."""
    return [word.replace("$$", "$").replace("%%", "%") for word in shlex.split(line)]


def words_of(kind: str, unit: str) -> list[str]:
    """The command line that a system runs."""
    if kind == "systemd":
        return systemd_words(settings_of(unit)["ExecStart"][0])
    if kind == "launchd":
        return list(plistlib.loads(unit.encode())["ProgramArguments"])
    action = ElementTree.fromstring(unit).find("task:Actions/task:Exec", TASK)
    assert action is not None
    return [action.findtext("task:Command", "", TASK), *windows_words(action.findtext("task:Arguments", "", TASK))]


def windows_words(line: str) -> Iterator[str]:
    r"""As Microsoft's C runtime has it: 2n backslashes before a quote are n, one more makes the quote a sign."""
    for raw in re.findall(r'(?:[^\s"\\]|\\+(?!")|(?:\\\\)*\\"|(?:\\\\)*"(?:[^"\\]|\\[^"]|\\")*")+', line):
        yield re.sub(r'(\\*)"', lambda found: "\\" * (len(found[1]) // 2) + '"' * (len(found[1]) % 2), raw)


def parsed(words: list[str]) -> dict[str, Any]:
    return vars(qmesh.make_parser().parse_args(words[2:]))


# --- What is printed ---


@pytest.mark.parametrize("kind", KINDS)
def test_each_system_runs_the_worker_with_all_that_is_in_force_and_absolute_paths(
    place: harness.Mesh, kind: str, tmp_path: Path, model_path: Path
) -> None:
    key, api_keys = tmp_path / "lab % $x.key", tmp_path / "api keys"
    assert place.run("init", str(key)).returncode == 0
    api_keys.write_text("a-key-of-the-gateway\n")
    relative = os.path.relpath(key, harness.ROOT)
    flags = [
        *("--topic", AWKWARD, "--key", relative, "--model", model_path.stem, "--state-dir", "my state"),
        *("--gpu-layers", "-1", "--slots", "3", "--ctx", "512", "--queue", "7", "--threads", "2", "--nice", "15"),
        *("--grace", "7.5", "--yield", "--port", "0", "--metrics", "9475", "--gateway", "--http", "127.0.0.1:8123"),
        *("--wait", "5", "--json", "--log-level", "info"),
    ]
    env = {"QMESH_PEERS": "lab1 lab2:5", "QMESH_API_KEY": str(api_keys), "QMESH_STALL_TIMEOUT": "4", "QMESH_HOST": ""}
    if kind == "windows":  # where what is between two % is a variable's name
        renamed = key.rename(tmp_path / "lab $x.key")
        flags[3] = relative = os.path.relpath(renamed, harness.ROOT)
    words = words_of(kind, printed(place, kind, *flags, env=env))
    assert words[:3] == [sys.executable, str(harness.PROGRAM), "worker"]
    shown, told = parsed(words), parsed(["", "", "worker", *flags])
    paths = {"key": str(harness.ROOT / relative), "api_key": str(api_keys), "state_dir": str(harness.ROOT / "my state")}
    same = {name: value for name, value in told.items() if value is not None} | paths | {"model": str(model_path)}
    assert {name: shown[name] for name in same} == same | {"metrics": "127.0.0.1:9475"}
    assert shown["peers"] == ["lab1", "lab2:5"]
    assert (shown["host"], shown["stall_s"], shown["print_service"]) == (None, "4", None)


def test_every_flag_of_the_worker_is_carried_over() -> None:
    """A new flag has to be: what is known here are their destinations."""
    parser = argparse.ArgumentParser()
    qmesh.worker_arguments(parser)
    usual = vars(parser.parse_args([]))
    settings = {field.name for field in dataclasses.fields(qmesh.Settings)}
    numbers = dict.fromkeys(usual.keys() - settings, 3) | {"ctx": 512, "print_service": "systemd"}
    switches = {name: True for name, value in usual.items() if value is False}
    arguments = argparse.Namespace(**(usual | numbers | switches))
    again = vars(parser.parse_args([*qmesh.worker_words(arguments)]))
    assert again == vars(arguments) | {"print_service": None}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_the_unit_goes_to_stdout_and_the_commands_to_stderr(place: harness.Mesh, kind: str) -> None:
    finished = place.run("worker", "--print-service", kind)
    heads = {"systemd": "[Unit]\n", "launchd": '<?xml version="1.0" ', "windows": '<?xml version="1.0"?>\n'}
    assert finished.stdout.startswith(heads[kind])
    assert finished.stdout.endswith("\n")
    starts = {"systemd": "systemctl enable --now", "launchd": "launchctl bootstrap", "windows": "schtasks /Create"}
    assert starts[kind] in finished.stderr


@pytest.mark.parametrize("variable", ["QMESH_KEY", "QMESH_API_KEY"])
def test_a_key_that_was_told_as_text_is_refused_and_shown_nowhere(place: harness.Mesh, variable: str) -> None:
    assert place.run("init", str(place.directory / "lab.key")).returncode == 0
    text = (place.directory / "lab.key").read_text().splitlines()[-1] if variable == "QMESH_KEY" else "word-of-passage"
    finished = place.run("worker", "--gateway", "--print-service", "launchd", env={variable: text})
    assert (finished.returncode, finished.stdout) == (2, "")
    assert f"{variable} holds a key" in finished.stderr
    assert "put the key into a file" in finished.stderr
    assert text not in finished.stderr


def test_a_key_as_text_that_is_not_in_force_does_no_harm(place: harness.Mesh) -> None:
    """A flag goes before it, and without --gateway there is no API."""
    key = place.directory / "lab.key"
    assert place.run("init", str(key)).returncode == 0
    secret = key.read_text().splitlines()[-1]
    env = {"QMESH_KEY": secret, "QMESH_API_KEY": "word-of-passage", "QMESH_HTTP": "8123"}
    unit = printed(place, "systemd", "--key", str(key), env=env)
    assert secret not in unit
    assert "passage" not in unit
    assert "--http" not in unit
    assert words_of("systemd", unit)[-6:].count(str(key)) == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--topic", "a\tb"), r"'a\tb' cannot be written into a unit"),
        (("--key", "no/such/file"), "the key file no/such/file cannot be read"),
        (("--gateway", "--http", "0.0.0.0:8080"), "give a key with --api-key"),
        (("--http", "8080"), "add --gateway"),
    ],
)
def test_what_the_service_could_not_do_is_refused_now(place: harness.Mesh, flags: tuple[str, ...], said: str) -> None:
    finished = place.run("worker", "--print-service", "systemd", *flags)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert said in finished.stderr


def test_a_model_that_is_not_there_yet_is_spoken_of(place: harness.Mesh) -> None:
    finished = place.run("worker", "--print-service", "systemd", "--model", "later/big.gguf")
    assert finished.returncode == 0
    assert "So far it would not start: there is no model file later/big.gguf" in finished.stderr
    assert parsed(words_of("systemd", finished.stdout))["model"] == str(harness.ROOT / "later" / "big.gguf")


def test_a_python_without_an_engine_and_one_that_may_be_cleared_are_spoken_of(place: harness.Mesh) -> None:
    """As `uv run` and `pipx run` make them."""
    folder = place.directory / ".cache" / "environment"
    venv.create(folder, symlinks=True)
    command = [str(folder / "bin" / "python"), str(harness.PROGRAM), "worker", "--print-service", "systemd"]
    options: dict[str, Any] = {"capture_output": True, "text": True, "cwd": harness.ROOT, "timeout": 60}
    finished = subprocess.run(command, env=place.env, check=True, **options)
    assert f"{folder} belongs to a cache that may be cleared: use an installed Python" in finished.stderr
    absent = "So far it would not start: llama-cpp-python and psutil are not installed here; install them with: "
    assert absent in finished.stderr
    assert absent not in place.run("worker", "--print-service", "systemd").stderr


def test_packages_that_are_closed_to_others_count_for_who_runs_it(
    as_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_path: Path
) -> None:
    """As those that root installed below its home."""
    (as_root / "closed").mkdir(mode=0o700)
    (as_root / "closed" / "psutil.py").touch()
    monkeypatch.delitem(sys.modules, "psutil", raising=False)
    monkeypatch.syspath_prepend(str(as_root / "closed"))
    arguments = qmesh.make_parser().parse_args(["worker", "--model", str(model_path)])
    settings = qmesh.resolve_settings(vars(arguments), {})
    told = qmesh.make_service(arguments, settings, qmesh.Terminal(shown=False))
    assert as_root / "closed" / "psutil.py" in told.files


def test_of_an_archive_the_service_runs_that_file(tmp_path: Path) -> None:
    archive = tmp_path / "my lab.pyz"
    subprocess.run([sys.executable, harness.ROOT / "build_zipapp.py", "-o", archive], check=True, capture_output=True)
    unit = printed(harness.Mesh(tmp_path, Path("none"), archive), "systemd")
    assert words_of("systemd", unit)[:3] == [sys.executable, str(archive), "worker"]


# --- What the systems are told besides ---


def service(**more: Any) -> qmesh.Service:
    usual: dict[str, Any] = {"command": ("/usr/bin/python3", "/opt/qmesh.pyz", "worker"), "files": ()}
    usual |= {"nice": 10, "grace_s": 5.0, "state_dir": None, "cache_dir": None}
    return qmesh.Service(**(usual | more))


def test_systemd_restarts_it_for_ever_after_a_failure_and_lets_it_finish(tmp_path: Path) -> None:
    """Nearly every cause may pass by itself: Python's own exit code for a file that is not there yet is 2."""
    unit = settings_of(qmesh.systemd_unit(service(grace_s=60.5), "ann"))
    assert unit["Restart"] == ["on-failure"]
    assert unit["StartLimitIntervalSec"] == ["0"]
    assert "RestartPreventExitStatus" not in unit
    assert unit["KillMode"] == ["mixed"]
    assert float(unit["TimeoutStopSec"][0]) > 60.5
    assert unit["User"] == ["ann"]
    assert unit["PrivateTmp"] == ["yes"]


def test_systemd_waits_until_the_folders_of_all_files_are_mounted(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "my % lab.pyz").symlink_to(tmp_path / "real" / "lab.pyz")
    files = tmp_path / "my % lab.pyz", Path("/nfs/my % models/big.gguf")
    unit = settings_of(qmesh.systemd_unit(service(files=files, state_dir=Path("/srv/state")), "ann"))
    waited_for = {word.replace("%%", "%") for word in shlex.split(unit["RequiresMountsFor"][0])}
    assert waited_for == {str(tmp_path), str(tmp_path / "real"), "/nfs/my % models", "/srv/state"}


def test_a_user_with_a_percent_sign_is_that_user() -> None:
    assert settings_of(qmesh.systemd_unit(service(), "an%n"))["User"] == ["an%%n"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_no_unit_can_hold_is_refused_in_a_user_s_name_too(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(qmesh, "user_name", lambda: "an\x1fn")
    monkeypatch.setattr(qmesh, "service_user", lambda service: "an\x1fn")
    assert qmesh.main(["worker", "--print-service", kind]) == 2
    assert r"'an\x1fn' cannot be written into a unit" in capsys.readouterr().err


def test_what_no_unit_can_hold_is_refused_in_the_path_of_the_home_and_the_log_too(place: harness.Mesh) -> None:
    finished = place.run("worker", "--print-service", "launchd", env={"HOME": str(place.directory / "a\x01b")})
    assert (finished.returncode, finished.stdout) == (2, "")
    assert r"a\x01b' cannot be written into a unit" in finished.stderr


@pytest.mark.parametrize("words", [("--topic", "50%", "--peer", "100%"), ("--topic", "%TEMP%")])
def test_what_windows_would_take_for_a_variable_is_refused(place: harness.Mesh, words: tuple[str, ...]) -> None:
    finished = place.run("worker", "--print-service", "windows", *words)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert "for a variable in what a task runs: choose names without %" in finished.stderr


@pytest.mark.parametrize(("nice", "weight"), [(19, "1"), (10, "11"), (0, "100"), (-20, "8674")])
def test_niceness_is_the_workers_own_and_counts_beside_other_services_too(
    tmp_path: Path, nice: int, weight: str
) -> None:
    unit = settings_of(qmesh.systemd_unit(service(nice=nice), "ann"))
    assert (unit["Nice"], unit["CPUWeight"]) == ([str(nice)], [weight])


def test_systemd_makes_its_folders_unless_others_were_told(tmp_path: Path) -> None:
    own = settings_of(qmesh.systemd_unit(service(), "ann"))
    assert own["Environment"] == ["QMESH_STATE_DIR=%S/qmesh", "QMESH_CACHE_DIR=%C/qmesh"]
    assert (own["StateDirectory"], own["CacheDirectory"]) == (["qmesh"], ["qmesh"])
    told = service(state_dir=Path("/srv/my state"), cache_dir=Path("/srv/100%"))
    unit = settings_of(qmesh.systemd_unit(told, "ann"))
    assert unit["ReadWritePaths"] == ['"/srv/my state"', "/srv/100%%"]
    assert unit["Environment"] == ["QMESH_CACHE_DIR=/srv/100%%"]
    assert "StateDirectory" not in unit


def test_what_lies_in_a_temporary_folder_can_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmesh, "TEMPORARY_DIRS", (tmp_path,))
    unit = settings_of(qmesh.systemd_unit(service(files=(tmp_path / "qmesh.pyz",)), "ann"))
    assert "PrivateTmp" not in unit
    assert unit["ReadWritePaths"] == [str(tmp_path)]


@pytest.fixture
def as_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that is open to all, as /opt is, to a program that root runs."""
    monkeypatch.setattr(qmesh, "TEMPORARY_DIRS", ())
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() == tmp_path.owner() and not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o001)  # as pytest makes them, below the user's own
    return tmp_path


def test_printed_by_root_it_runs_as_a_user_of_its_own_where_all_may_read_its_files(as_root: Path) -> None:
    program = as_root / "qmesh.pyz"
    program.touch(mode=0o644)
    told = service(files=(program,))
    assert qmesh.service_user(told) == ""
    unit = settings_of(qmesh.systemd_unit(told, ""))
    assert unit["DynamicUser"] == ["yes"]
    assert "User" not in unit


@pytest.mark.parametrize("closed", ["file", "folder", "state"])
def test_what_is_closed_to_others_runs_as_its_owner(as_root: Path, closed: str) -> None:
    """As a sealed archive is, and a key."""
    folder = as_root / "folder"
    folder.mkdir(mode=0o700 if closed == "folder" else 0o755)
    program = folder / "lab.pyz"
    program.touch(mode=0o700 if closed == "file" else 0o755)
    told = service(files=(program,), state_dir=folder / "new" if closed == "state" else None)
    assert qmesh.service_user(told) == program.owner()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_files_of_two_users_that_are_closed_to_each_other_are_refused(as_root: Path) -> None:
    files = as_root / "lab.pyz", as_root / "model.gguf"
    for path, owner in zip(files, (0, 1), strict=True):
        path.touch(mode=0o600)
        os.chown(path, owner, -1)
    with pytest.raises(qmesh.UsageError, match="no user but root can use all"):
        qmesh.service_user(service(files=files))


def test_launchd_starts_it_at_boot_and_again_after_a_failure(place: harness.Mesh) -> None:
    body = plistlib.loads(printed(place, "launchd", "--grace", "9", env={"QMESH_CACHE_DIR": "cache"}).encode())
    assert (body["RunAtLoad"], body["KeepAlive"], body["Nice"]) == (True, {"SuccessfulExit": False}, 10)
    assert body["ExitTimeOut"] > 9
    assert body["EnvironmentVariables"]["QMESH_CACHE_DIR"] == str(harness.ROOT / "cache")
    assert parsed(body["ProgramArguments"])["state_dir"] == str(place.state_dir)


def test_windows_starts_it_at_boot_and_looks_again_and_again_whether_it_runs(place: harness.Mesh) -> None:
    text = printed(place, "windows")
    assert text.isascii()  # and names no encoding: what a shell makes of it on its way to a file is right
    task = ElementTree.fromstring(text)
    settings = {
        "Triggers/task:BootTrigger/task:Repetition/task:Interval": "PT5M",
        "Settings/task:MultipleInstancesPolicy": "IgnoreNew",
        "Settings/task:ExecutionTimeLimit": "PT0S",
        "Settings/task:Priority": "7",
        "Principals/task:Principal/task:LogonType": "S4U",
    }
    assert {path: task.findtext(f"task:{path}", None, TASK) for path in settings} == settings


def test_the_user_of_a_windows_task_is_told_to_set_the_folder_of_the_cache(place: harness.Mesh) -> None:
    finished = place.run("worker", "--print-service", "windows", env={"QMESH_CACHE_DIR": "cache"})
    assert finished.returncode == 0
    assert "QMESH_CACHE_DIR counts, set it with `setx`" in finished.stderr


# --- Trying it ---


def test_systemd_has_nothing_to_say_against_the_unit(place: harness.Mesh, model_path: Path, tmp_path: Path) -> None:
    """Skips where systemd is not; fails where it has to be (QMESH_TEST_SYSTEMD=required)."""
    if shutil.which("systemd-analyze") is None:
        if os.environ.get("QMESH_TEST_SYSTEMD") == "required":
            pytest.fail("there is no systemd-analyze")
        pytest.skip("there is no systemd-analyze")
    told = ("--topic", AWKWARD, "--model", str(model_path))
    units = {
        "plain": printed(place, "systemd", *told, env={"QMESH_STATE_DIR": ""}),
        "told": printed(place, "systemd", *told, "--state-dir", "my % state", env={"QMESH_CACHE_DIR": "my cache"}),
    }
    units["root"] = re.sub("^User=.*", "DynamicUser=yes", units["plain"], flags=re.MULTILINE)
    units["broken"] = units["plain"].replace("Restart=", "Restrat=")
    said = {}
    for name, text in units.items():
        path = tmp_path / f"{name}.service"
        path.write_text(text, "utf-8")
        command = ["systemd-analyze", "verify", "--man=no", str(path)]
        said[name] = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stderr
    assert "'Restrat'" in said.pop("broken")  # so that silence means something
    assert said == {"plain": "", "told": "", "root": ""}


def test_the_unit_starts_a_worker_that_ends_well_at_sigterm(mesh: harness.Mesh, tmp_path: Path) -> None:
    flags = ("--json", "--model", str(mesh.model), *harness.WORKER_FLAGS)
    unit = settings_of(printed(mesh, "systemd", *flags, env={"QMESH_STATE_DIR": ""}))
    places = " ".join(unit["Environment"]).replace("%S", str(tmp_path / "lib")).replace("%C", str(tmp_path / "cache"))
    env = dict(line.split("=", 1) for line in places.split()) | {"PATH": "/usr/bin:/bin"}
    process = harness.Process(systemd_words(unit["ExecStart"][0]), env, tmp_path / "log")
    try:
        assert process.wait_ready()["event"] == "ready"
        assert mesh.json("status")["workers"][0]["worker_id"] == process.worker_id  # host and topic went with it
        assert len([*(tmp_path / "lib" / "qmesh").glob("*/0/node.key")]) == 1
        assert process.stop() == 0
    finally:
        process.end()


# --- uv, pipx and pip ---


def requirements() -> list[str]:
    """The worker's two libraries."""
    lines = (harness.ROOT / "requirements.txt").read_text("utf-8").splitlines()
    return [line for line in lines if not line.startswith(("#", "pytest"))]


def test_uv_and_pipx_learn_from_the_script_what_it_needs() -> None:
    """By the expression that PEP 723 gives."""
    expression = r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$"
    (found,) = re.finditer(expression, harness.PROGRAM.read_text("utf-8"))
    assert found["type"] == "script"
    metadata = tomllib.loads(re.sub("(?m)^# ?", "", found["content"]))
    assert metadata["dependencies"] == requirements()
    assert metadata["requires-python"] == PROJECT["project"]["requires-python"]


def test_the_package_needs_nothing_to_ask_and_the_same_to_work() -> None:
    assert "dependencies" not in PROJECT["project"]
    assert PROJECT["project"]["optional-dependencies"]["worker"] == requirements()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command that `pip install` makes; the source is a copy, in which nothing else lies about."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "qmesh.py", "build_zipapp.py"):
        shutil.copyfile(harness.ROOT / name, source / name)
    (source / "models").mkdir()
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    flags = ["--no-deps", "--no-index", "--no-build-isolation"]  # without a network
    subprocess.run([*pip, "wheel", *flags, "-w", folder, source], check=True, timeout=60)
    (wheel,) = folder.glob("qmesh-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == {"qmesh.py"}
    venv.create(folder / "venv")
    python = folder / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "--no-index", wheel], check=True, timeout=60)
    return folder / "venv" / "bin" / "qmesh"


def test_the_installed_command_speaks_of_itself_as_it_is_typed(installed: Path, place: harness.Mesh) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        env = place.env | {"XDG_STATE_HOME": str(place.directory / "kept")}
        options: dict[str, Any] = {"capture_output": True, "text": True, "cwd": place.directory, "timeout": 60}
        return subprocess.run([str(installed), *arguments], env=env, check=False, **options)

    assert run("--version").stdout.startswith(f"qmesh {qmesh.__version__} ")
    alone = run("prompt", "hi", "--timeout", "1")
    assert (alone.returncode, alone.stdout) == (qmesh.NoWorkerFound.exit_code, "")
    assert "Start one with `qmesh worker`" in alone.stderr
    assert run("prompt").returncode == 2
    assert "\n  qmesh pull  " in run("--help").stdout
    assert "\n     qmesh worker --key " in run("init", "lab.key").stderr
    assert f"there is no model in {place.directory}/kept/qmesh/models, " in run("models").stderr
    assert words_of("systemd", run("worker", "--print-service", "systemd").stdout)[1].endswith("/qmesh.py")


@pytest.mark.parametrize("typed", ["qmesh", "qmesh.py", "lab.pyz", "my lab.pyz"])
def test_commands_are_suggested_as_they_are_typed(typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [f"/somewhere/{typed}"])
    quoted = shlex.quote(typed)
    name = quoted if typed == "qmesh" else f"python {quoted}"
    assert qmesh.as_typed("see `python qmesh.py worker` or `qmesh.py --help`") == (
        f"see `{name} worker` or `{quoted} --help`"
    )
    assert f"\n  {name} prompt " in qmesh.make_parser().format_help()
