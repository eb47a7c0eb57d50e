"""`h2keep run`: programs as they are, in processes of their own, with connections that stay alive."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import h2keep.cli
from h2keep.cli.middlebox import FlowForgotten
from support.servers import Server, forgetful

if TYPE_CHECKING:
    from collections.abc import Mapping

_SITE = str(Path(h2keep.cli.__file__).parent / "_site")
_ROOT = str(Path(__file__).parent.parent.parent)
RUN = (sys.executable, "-m", "h2keep", "run")

#: What a program can see of how it was started.
FACTS = """
import json, sys
spec = __spec__ and __spec__.name
facts = [sys.argv, sys.path, __name__, spec, globals().get("__file__"), sys.flags.isolated, sys.warnoptions]
print(json.dumps([*facts, "sitecustomize" in sys.modules and sys.modules["sitecustomize"].__file__]))
"""
#: Asks for each of the URLs it is given, with both libraries, and says who brought the answer.
ASK = """
import sys, httpx, httpx2
def ask(url):
    answers = [library.get(url, timeout=20.0) for library in (httpx, httpx2)]
    return ["h2keep" if "h2keep" in answer.extensions else answer.http_version for answer in answers]
"""


def start(
    *command: str, directory: Path | str | None = None, **environment: str | None
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; what is None is not in its environment."""
    given = {name: value for name, value in {**_environment(), **environment}.items() if value is not None}
    return subprocess.run(
        command, env=given, cwd=directory, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60.0
    )


def _environment() -> Mapping[str, str]:
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("H2KEEP_", "COV_"))}
    return {name: value for name, value in mine.items() if name != "PYTHONPATH" and "PROXY" not in name.upper()}


def answer(done: subprocess.CompletedProcess[str]) -> Any:
    """What a program has printed as JSON, if nothing went wrong."""
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


class TestTheProgram:
    """It is as without, but for one thing."""

    @pytest.mark.parametrize("how", ["script", "-c", "-m", "-m package"])
    def test_it_sees_what_it_would_see(self, tmp_path: Path, how: str) -> None:
        (tmp_path / "facts.py").write_text(FACTS)
        (tmp_path / "package").mkdir()
        (tmp_path / "package" / "__main__.py").write_text(FACTS)
        (tmp_path / "package" / "__init__.py").write_text("")
        command = {
            "script": [str(tmp_path / "facts.py")],
            "-c": ["-W", "error", "-c", FACTS],
            "-m": ["-m", "facts"],
            "-m package": ["-m", "package"],
        }[how]
        program = [sys.executable, *command, "-h", "--ping-timeout", "--", "x y"]
        expected = answer(start(*program, directory=tmp_path))
        *seen, site = answer(start(*RUN, "--", *program, directory=tmp_path))
        assert seen == expected[:-1]
        assert seen[0][1:] == ["-h", "--ping-timeout", "--", "x y"]
        # The last word has whoever would have had it: the Python's own, where it has one.
        assert site == (expected[-1] or str(Path(_SITE) / "sitecustomize.py"))

    def test_it_keeps_what_is_on_its_path(self, tmp_path: Path) -> None:
        (tmp_path / "mine.py").write_text("print('mine')")
        done = start(*RUN, sys.executable, "-c", "import mine", PYTHONPATH=str(tmp_path))
        assert (done.returncode, done.stdout) == (0, "mine\n")

    def test_it_starts_with_no_more_modules_than_without(self) -> None:
        code = "import sys; print(*sys.modules)"
        without = start(sys.executable, "-c", code).stdout.split()
        done = start(*RUN, sys.executable, "-c", code).stdout.split()
        assert set(done) - set(without) <= {"sitecustomize", "__future__"}

    def test_its_exit_code_is_its_own(self) -> None:
        assert start(*RUN, sys.executable, "-c", "import sys; sys.exit(7)").returncode == 7

    def test_its_process_and_signals_are_its_own(self) -> None:
        code = "import os, signal; print(os.getpid(), flush=True); signal.pause()"
        process = subprocess.Popen([*RUN, sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        with process.stdout:
            assert int(process.stdout.readline()) == process.pid
            process.terminate()
            assert process.wait(20.0) == -signal.SIGTERM

    def test_it_need_not_be_python(self) -> None:
        done = start(*RUN, "--ping-timeout", "9", "--", "sh", "-c", "echo $H2KEEP_PING_TIMEOUT $0; exit 3", "zero")
        assert (done.returncode, done.stdout) == (3, "9 zero\n")

    def test_the_libraries_look_as_if_nothing_had_happened(self) -> None:
        code = """
            import importlib, importlib.resources, inspect, json, httpx2
            loaders = type(httpx2.__loader__).__name__, httpx2.__spec__.loader is httpx2.__loader__
            typed = importlib.resources.files(httpx2) / "py.typed"
            facts = [*loaders, inspect.getsource(httpx2) != "", typed.is_file()]
            importlib.reload(httpx2)
            print(json.dumps([*facts, repr(httpx2.Client()._transport._pool)[:7]]))
        """
        expected = ["SourceFileLoader", True, True, True]
        code = "\n".join(line.strip() for line in code.splitlines())
        assert answer(start(*RUN, "--", sys.executable, "-c", code)) == [*expected, "<h2keep"]
        assert answer(start(sys.executable, "-c", code)) == [*expected, "<Connec"]


class TestItsConnections:
    def test_k3_a_silent_answer_survives(self, hypercorn: Server, ca_path: Path) -> None:
        code = "import sys, httpx2; print(httpx2.get(sys.argv[1], timeout=2.5).text)"
        program = [sys.executable, "-c", code]
        options = ["--read-idle-timeout", "0.2", "--log", "debug"]
        with forgetful(hypercorn.url, 0.8) as box:
            url = f"{box.url}/slow?seconds=1.5"
            done = start(*RUN, *options, "--", *program, url, SSL_CERT_FILE=str(ca_path))
            assert json.loads(done.stdout) == {"slow": True}
            assert " DEBUG " in done.stderr
            assert "PING" in done.stderr
            assert not box.seen(FlowForgotten)
            done = start(*program, url, SSL_CERT_FILE=str(ca_path))
            assert done.returncode == 1
            assert "ReadTimeout" in done.stderr
            assert box.seen(FlowForgotten)

    def test_the_variables_have_their_effect_and_options_go_before_them(self, hypercorn: Server, ca_path: Path) -> None:
        code = "import sys, httpx; print(httpx.get(sys.argv[1]).extensions['h2keep'].pings_sent)"
        program = ["--", sys.executable, "-c", code, f"{hypercorn.url}/slow?seconds=1.5"]
        settings = {"SSL_CERT_FILE": str(ca_path), "H2KEEP_READ_IDLE_TIMEOUT": "0.2"}
        assert int(start(*RUN, *program, **settings).stdout) >= 1
        assert int(start(*RUN, "--read-idle-timeout", "20", *program, **settings).stdout) == 0

    @pytest.mark.parametrize("covered", [True, False])
    def test_child_processes_are_covered_unless_they_are_isolated(
        self, hypercorn: Server, ca_path: Path, tmp_path: Path, covered: bool
    ) -> None:
        (tmp_path / "child.py").write_text(f"{ASK}\nprint(*ask(sys.argv[1]))")
        (tmp_path / "app.py").write_text(
            "import subprocess, sys; sys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))"
        )
        isolated = [] if covered else ["-I"]
        command = ["app.py", *isolated, "child.py", f"{hypercorn.url}/echo"]
        done = start(*RUN, sys.executable, *command, directory=tmp_path, SSL_CERT_FILE=str(ca_path))
        assert done.stdout.split() == (["h2keep"] * 2 if covered else ["HTTP/1.1"] * 2)

    @pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
    def test_multiprocessing_is_covered(self, hypercorn: Server, ca_path: Path, tmp_path: Path, method: str) -> None:
        (tmp_path / "app.py").write_text(
            f"{ASK}\nimport multiprocessing\nif __name__ == '__main__':\n"
            "    with multiprocessing.get_context(sys.argv[1]).Pool(1) as pool:\n"
            "        print(*ask(sys.argv[2]), *pool.apply(ask, [sys.argv[2]]))\n"
        )
        command = [sys.executable, "app.py", method, f"{hypercorn.url}/echo"]
        done = start(*RUN, "--", *command, directory=tmp_path, SSL_CERT_FILE=str(ca_path))
        assert (done.stdout.split(), done.stderr) == (["h2keep"] * 4, "")


class TestAnotherSitecustomize:
    @pytest.fixture
    def program(self) -> list[str]:
        code = "import sitecustomize, httpx2; print(vars(sitecustomize).get('mine'), httpx2.Client()._transport._pool)"
        return [sys.executable, "-c", code]

    def test_it_has_its_turn(self, tmp_path: Path, program: list[str]) -> None:
        (tmp_path / "sitecustomize.py").write_text("mine = __name__")
        done = start(*RUN, "--", *program, PYTHONPATH=str(tmp_path))
        assert done.stdout.startswith("sitecustomize <h2keep ")
        assert done.stderr == ""

    @pytest.mark.parametrize("failure", ["1 / 0", "import no_such_module"])
    def test_its_errors_are_told_as_ever(self, tmp_path: Path, program: list[str], failure: str) -> None:
        (tmp_path / "sitecustomize.py").write_text(failure)
        code = "import httpx2; print(httpx2.Client()._transport._pool)"
        done = start(*RUN, "--", sys.executable, "-c", code, PYTHONPATH=str(tmp_path))
        assert done.stdout.startswith("<h2keep ")
        error = start(sys.executable, "-c", "pass", PYTHONPATH=str(tmp_path)).stderr
        # Once from h2keep's own start, and once from the program's.
        assert done.stderr == 2 * error
        assert error != ""

    def test_run_in_run_is_run(self, program: list[str]) -> None:
        done = start(*RUN, "--", *RUN, "--", *program, PYTHONPATH="")
        assert done.stdout.startswith("None <h2keep in the place of <ConnectionPool ")


class TestErrors:
    """None of them breaks the program; each is one line."""

    def test_a_variable_that_changed_on_the_way(self) -> None:
        code = "import httpx, httpx2; print(repr(httpx2.Client()._transport._pool)[:7])"
        done = start(
            *(*RUN, "env", "H2KEEP_PING_TIMEOUT=soon", sys.executable, "-c", code),
        )
        assert done.stdout == "<Connec\n"
        assert done.stderr.splitlines() == [
            f"h2keep: {name} is used as it is, without PINGs: ValueError: H2KEEP_PING_TIMEOUT: 'soon' is not a number "
            "of seconds above 0"
            for name in ("httpx", "httpx2")
        ]

    def test_a_version_that_is_not_known(self, tmp_path: Path) -> None:
        (tmp_path / "httpx.py").write_text(
            "__version__ = '9.9'\nclass HTTPTransport: pass\nclass AsyncHTTPTransport: pass"
        )
        done = start(
            *RUN, "--", sys.executable, "-c", "import httpx; print(httpx.__version__)", PYTHONPATH=str(tmp_path)
        )
        assert (done.returncode, done.stdout) == (0, "9.9\n")
        (line,) = done.stderr.splitlines()
        assert line.startswith(
            "h2keep: httpx is used as it is, without PINGs: RuntimeError: h2keep can't be installed into"
        )
        assert "httpx 9.9" in line

    def test_a_python_without_h2keep(self, tmp_path: Path) -> None:
        (tmp_path / "httpx.py").write_text("__version__ = '9.9'")
        python = os.path.realpath(sys.executable)
        code = "import httpx; print(httpx.__version__)"
        done = start(*RUN, "--", python, "-s", "-c", code, PYTHONPATH=str(tmp_path))
        assert (done.returncode, done.stdout) == (0, "9.9\n")
        assert done.stderr == (
            "h2keep: httpx is used as it is, without PINGs: ModuleNotFoundError: No module named 'h2keep'\n"
        )

    def test_a_library_that_cannot_be_imported(self, tmp_path: Path) -> None:
        (tmp_path / "httpx.py").write_text("raise ValueError('broken')")
        code = "try:\n    import httpx\nexcept ValueError as error:\n    print(error)"
        done = start(*RUN, "--", sys.executable, "-c", code, PYTHONPATH=str(tmp_path))
        assert (done.stdout, done.stderr) == ("broken\n", "")


class TestTheCommand:
    def test_help(self) -> None:
        done = start(*RUN, "-h")
        assert done.returncode == 0
        for name in ("H2KEEP_READ_IDLE_TIMEOUT", "H2KEEP_PING_TIMEOUT", "H2KEEP_LOG"):
            assert name in done.stdout
        assert "run " in start(sys.executable, "-m", "h2keep", "-h").stdout

    @pytest.mark.parametrize("variable", ["H2KEEP_READ_IDLE_TIMEOUT", "H2KEEP_PING_TIMEOUT", "H2KEEP_LOG"])
    @pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", "inf"])
    def test_bad_values_are_refused_by_name(self, variable: str, value: str) -> None:
        done = start(*RUN, "--", "echo", "started", **{variable: value})
        assert (done.returncode, done.stdout) == (2, "")
        assert f"{variable}: '{value}' is not " in done.stderr

    def test_bad_options_are_refused_by_name(self) -> None:
        done = start(*RUN, "--ping-timeout", "soon", "--", "echo", "started")
        assert (done.returncode, done.stdout) == (2, "")
        assert "--ping-timeout: 'soon' is not a number of seconds above 0" in done.stderr

    def test_an_empty_variable_is_none(self) -> None:
        assert start(*RUN, "echo", "started", H2KEEP_PING_TIMEOUT="", H2KEEP_LOG="").stdout == "started\n"

    def test_without_a_command_there_is_nothing_to_run(self) -> None:
        assert start(*RUN).returncode == 2

    @pytest.mark.parametrize(("command", "code"), [("no-such-command", 127), (_ROOT, 126)])
    def test_a_command_that_cannot_be_run(self, command: str, code: int) -> None:
        done = start(*RUN, command)
        assert done.returncode == code
        assert done.stderr.startswith(f"h2keep run: {command}: ")
