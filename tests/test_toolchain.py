"""The build finds its tools wherever they are, and says what it lacks.

A stand-in for the compilers keeps these tests quick. ``test_build.py`` compiles in earnest.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import select
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from building import STAND_IN, checkout, program
from native.build import toolchain

ROOT = Path(__file__).parent.parent
BASELINE = "zo_kernels.baseline.o"
ANY_PATH = "it's a $HOME: ä"  # what a shell, ninja and an ASCII terminal would each misread

ANY_FOLDER = ANY_PATH.replace(":", "")  # of a list of folders, such as PATH

# deletes what Windows does not have
WINDOWS = """
import os, platform, runpy, sys
del os.uname, os.sched_getaffinity
platform.system, platform.machine = lambda: "Windows", lambda: "AMD64"
sys.argv = ["setup.py", *sys.argv[1:]]
runpy.run_path("setup.py", run_name="__main__")
"""
# what pip writes into the folder that an isolated build has on its path
ISOLATED = "import sys; sys.path = [path for path in sys.path if 'site-packages' not in path or {build!r} in path]"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return checkout(tmp_path_factory.mktemp("build") / "leanops")


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """A virtual environment's Python. It has this one's packages by a .pth file, and no script of ninja."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    places = [path for path in sys.path if "site-packages" in path]
    (site / "others.pth").write_text("\n".join(places) + "\n")
    return folder / "bin" / "python"


def test_a_checkout_may_have_any_path(tmp_path):
    source = checkout(tmp_path / ANY_PATH / "leanops")
    built = source.build()
    assert built.report["cpu"] == {"built": True}
    assert (source.folder / "lib/leanops/lib/libleanops_cpu.so").exists()
    assert built.command("libleanops_cpu.so")[0] == str(tmp_path / ANY_PATH / "tools" / "g++")


def test_an_ascii_locale_takes_such_a_path(tmp_path):
    source = checkout(tmp_path / ANY_PATH / "leanops")
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    assert source.build(environment=source.environment(**ascii_only)).report["cpu"] == {"built": True}


def test_the_output_folder_may_have_any_path(source):
    built = source.build(build_lib=ANY_PATH)
    assert built.report["cpu"] == {"built": True}
    assert (source.folder / ANY_PATH / "leanops/lib/libleanops_cpu.so").exists()


def test_an_environment_may_have_any_path(source, tmp_path):
    torch = tmp_path / ANY_FOLDER / "torch"
    (torch / "include" / "torch").mkdir(parents=True)
    (torch / "__init__.py").touch()
    built = source.build(environment=source.environment(PYTHONPATH=str(torch.parent)))
    assert str(torch / "include") in built.command("zo_cpu.o")
    assert f"-L{torch}/lib" in built.command("libleanops_cpu.so")


@pytest.mark.parametrize("folder", ["cuda", ANY_FOLDER])
def test_cuda_may_have_any_path(source, tmp_path, folder):
    nvcc = program(tmp_path / folder / "bin" / "nvcc")
    environment = source.environment(CUDA_HOME=str(tmp_path / folder), LEANOPS_CUDA_ARCHS="90")
    built = source.build(environment=environment)
    assert built.report["cuda"] == {"built": True, "archs": ["90"]}
    assert built.command("zo_cuda.o")[0] == str(nvcc)
    assert f"-L{tmp_path / folder}/lib64" in built.command("libleanops_cuda.so")


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        pytest.param("{0}/ccache {0}/g++", ["ccache", "g++"], id="launcher"),
        pytest.param("{0}/g++ -m64", ["g++", "-m64"], id="flag"),
        pytest.param("{0}/ccache {0}/g++ -m64 -Wl,-O1", ["ccache", "g++", "-m64", "-Wl,-O1"], id="launcher-and-flags"),
        pytest.param("'{0}/a compiler/g++' -m64", ["a compiler/g++", "-m64"], id="quoted-path"),
        pytest.param("{0}/a compiler/g++", ["a compiler/g++"], id="bare-path"),
    ],
)
def test_cxx_is_split_as_a_shell_does(source, tmp_path, wish, words):
    for name in ("ccache", "g++", "a compiler/g++"):
        program(tmp_path / name)
    program(tmp_path / "cuda/bin/nvcc")
    cuda = {"CUDA_HOME": str(tmp_path / "cuda"), "LEANOPS_CUDA_ARCHS": "90"}
    built = source.build(environment=source.environment(CXX=wish.format(tmp_path), **cuda))
    assert built.report["cpu"] == {"built": True}
    words = [word if word.startswith("-") else str(tmp_path / word) for word in words]
    assert built.command(BASELINE)[: len(words)] == words
    assert built.command("libleanops_cpu.so")[: len(words)] == words
    host = built.command("zo_cuda.o")  # nvcc takes a compiler without its launcher
    assert host[host.index("-ccbin") + 1] == [word for word in words if not word.startswith("-")][-1]
    flags = [word.replace(",", r"\,") for word in words if word.startswith("-")]
    assert [word.removeprefix("-Xcompiler=") for word in host if word.startswith("-Xcompiler=")] == flags


@pytest.mark.parametrize(
    ("wish", "reason"),
    [
        (
            "no-such-compiler",
            "no C++ compiler found (looked at CXX=no-such-compiler); install g++ or clang++, or set CXX",
        ),
        ("g++ 'oops", "CXX=g++ 'oops cannot be split into words: No closing quotation; correct CXX"),
    ],
)
def test_a_wrong_cxx_costs_the_library_alone(source, wish, reason):
    assert source.build(environment=source.environment(CXX=wish)).report["cpu"] == {"built": False, "reason": reason}


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        pytest.param("exit 3", r"FAILED: .*\.o \| ninja: build stopped", id="without-a-word"),
        pytest.param("echo 'g++: no licence'; exit 1", r"FAILED: .*\.o \| g\+\+: no licence", id="in-its-words"),
        pytest.param('echo "a.h:1: ${LC_ALL:-$LANG} error: ‘x’"; exit 1', "a.h:1: C error: ‘x’", id="in-english"),
        pytest.param("echo 'nvcc error : killed'; exit 1", "nvcc error : killed", id="nvcc"),
    ],
)
def test_a_compiler_that_fails_costs_the_library_alone_and_is_quoted(source, tmp_path, script, reason):
    cxx = program(tmp_path / "g++", f"#!/bin/sh\n{script}\n")
    environment = source.environment(CXX=str(cxx), LANG="de_DE.UTF-8", LC_ALL="unset", PYTHONIOENCODING="ascii")
    built = source.build(environment=environment)
    assert not built.report["cpu"]["built"]
    assert re.fullmatch(
        f"the build failed: {reason}.*; pip install -v shows all of its output", built.report["cpu"]["reason"]
    )
    assert "leanops: without the cpu library: the build failed: " in built.output


def test_no_flag_of_cxx_changes_the_arithmetic(source):
    flags = source.build().command(BASELINE)[1:]
    stop = flags.index("-c")
    asked = ["g++", "-Ofast", "-ffast-math", "-ffp-contract=fast", *flags[3:stop], "-dM", "-E", "-x", "c++", os.devnull]
    macros = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    assert "__OPTIMIZE__" in macros
    assert "__FAST_MATH__" not in macros
    assert "__FINITE_MATH_ONLY__ 0" in macros


def test_windows_gets_a_package_and_a_reason(source):
    built = source.build([sys.executable, "-c", WINDOWS, *source.command()[2:]])
    reason = "the native libraries are built on Linux only, this is Windows"
    assert built.report == {name: {"built": False, "reason": reason} for name in ("cpu", "cuda")}


def test_ninja_may_be_a_package_whose_script_is_on_no_path(source, bare_python, tmp_path):
    tools = program(tmp_path / "g++").parent
    environment = source.environment(PATH=str(tools))
    assert source.build(source.command(bare_python), environment=environment).report["cpu"] == {"built": True}


def test_without_ninja_there_is_a_reason(monkeypatch):
    def none(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(toolchain.shutil, "which", lambda name, path: None)
    monkeypatch.setattr(toolchain.importlib.metadata, "files", none)
    with pytest.raises(toolchain.Unavailable, match="ninja is not installed; pip install ninja"):
        toolchain.find_ninja()


def test_an_isolated_build_finds_the_torch_of_the_environment(source, bare_python, tmp_path):
    """pip takes site-packages off the path. This torch came there by a .pth file, others come from the base Python."""
    build = tmp_path / "build-env" / "site-packages"
    build.mkdir(parents=True)
    for package in ("setuptools", "_distutils_hack"):
        found = importlib.util.find_spec(package)
        (build / package).symlink_to(Path(found.origin).parent)
    (tmp_path / "sitecustomize.py").write_text(ISOLATED.format(build=str(build)))
    python_path = os.pathsep.join([str(tmp_path), str(build)])
    path = os.pathsep.join([os.environ["PATH"], str(Path(toolchain.find_ninja()).parent)])
    environment = source.environment(PYTHONPATH=python_path, PYTHONNOUSERSITE="1", PATH=path)
    torch = subprocess.run([bare_python, "-c", "import torch"], env=environment, capture_output=True)
    assert torch.returncode != 0
    assert source.build(source.command(bare_python), environment=environment).report["cpu"] == {"built": True}


def test_a_read_only_checkout_gives_a_wheel(source, tmp_path):
    unshare = ["unshare", "--mount", "--map-root-user"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("needs unshare and the right to mount in a namespace, to make a folder read-only for root as well")
    read_only = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && ! touch "$0/x" && exec "$@"'
    wheel = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", tmp_path, source.folder]
    done = subprocess.run(
        [*unshare, "sh", "-c", read_only, source.folder, *wheel],
        env=source.environment(TMPDIR=str(tmp_path)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = tmp_path.glob("*.whl")
    assert "leanops/lib/libleanops_cpu.so" in zipfile.ZipFile(built).namelist()
    assert not list(tmp_path.glob("leanops-build-*"))


def test_progress_is_printed_as_it_is_made(source, tmp_path):
    """The first line comes while the second compiler still waits for this test."""
    go = tmp_path / "go"
    wait = f"[ -s {tmp_path}/first ] && while [ ! -e {go} ]; do sleep 0.05; done; echo $$ > {tmp_path}/first\n"
    cxx = program(tmp_path / "g++", STAND_IN.replace("while [ $#", wait + "while [ $#"))
    environment = source.environment(CXX=str(cxx), MAX_JOBS="1")
    process = subprocess.Popen(source.command(), cwd=source.folder, env=environment, stdout=subprocess.PIPE)
    try:
        lines = []
        while not any("[1/" in line for line in lines):
            assert select.select([process.stdout], [], [], 60)[0], lines
            lines.append(process.stdout.readline().decode())
            assert lines[-1], lines
        assert process.poll() is None
    finally:
        go.touch()
        rest = process.communicate(timeout=60)[0].decode()
    files = (
        len(list(source.folder.glob("csrc/*/*_kernels.cpp"))) * 3
        + len(list(source.folder.glob("csrc/*/*_cpu.cpp")))
        + 1
    )
    if platform.machine() == "x86_64":
        assert f"leanops: building the cpu library: {files} files, 1 at a time\n" in "".join(lines)
    assert re.search(r"leanops: cpu library \[2/\d+, [\d.]+ s\] csrc/\S+, \w+", rest)


@pytest.mark.parametrize(
    ("cores", "available", "limit", "max_jobs", "expected"),
    [
        # files are compiled first, then the architectures of a file
        pytest.param(16, 100, "max", "", (4, 16), id="plenty"),
        pytest.param(2, 22, "max", "", (2, 2), id="two-cores"),
        pytest.param(16, 6, "max", "", (4, 1), id="little-memory"),
        pytest.param(16, 100, 3 << 30, "", (3, 1), id="container"),
        pytest.param(16, 0.5, "max", "", (1, 1), id="too-little"),
        pytest.param(16, 100, "max", "2", (2, 1), id="MAX_JOBS"),
        pytest.param(16, 0.5, "max", "8", (4, 2), id="MAX_JOBS-over-memory"),
        pytest.param(16, 100, "max", "many", (4, 16), id="MAX_JOBS-that-is-no-number"),
    ],
)
def test_compilers_run_at_a_time_as_cores_and_memory_allow(
    monkeypatch, tmp_path, cores, available, limit, max_jobs, expected
):
    (tmp_path / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:   {int(available * 2**20)} kB\n")
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    monkeypatch.setattr(toolchain, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(toolchain, "MEMORY_LIMITS", [tmp_path / "memory.max", tmp_path / "absent"])
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(cores))
    monkeypatch.setenv("MAX_JOBS", max_jobs)
    assert toolchain.parallel(4) == expected


def test_nvcc_gets_its_share_of_the_jobs_and_no_machine_rebuilds_for_it(source, tmp_path):
    share = 'echo "NVCC_APPEND_FLAGS=$NVCC_APPEND_FLAGS"\n'
    program(tmp_path / "cuda/bin/nvcc", STAND_IN + share)
    cuda = {"CUDA_HOME": str(tmp_path / "cuda"), "LEANOPS_CUDA_ARCHS": "90", "NVCC_APPEND_FLAGS": "-lineinfo"}
    built = source.build(environment=source.environment(MAX_JOBS="1", **cuda))
    assert "NVCC_APPEND_FLAGS=-lineinfo --threads 1\n" in built.output
    again = source.build(environment=source.environment(MAX_JOBS="64", **cuda), clean=False)
    outputs = sorted(Path(c[c.index("-o") + 1]).name for c in again.commands)
    assert outputs == ["libleanops_cpu.so", "libleanops_cuda.so"]


def test_nvcc_runs_without_threads_where_the_temporary_folder_has_a_space(source, tmp_path):
    """With threads it fails there: it redirects their output by a shell, unquoted."""
    program(tmp_path / "cuda/bin/nvcc", STAND_IN + 'echo "NVCC_APPEND_FLAGS=$NVCC_APPEND_FLAGS"\n')
    temporary = tmp_path / "temporary files"
    temporary.mkdir()
    environment = {"CUDA_HOME": str(tmp_path / "cuda"), "LEANOPS_CUDA_ARCHS": "80;90", "MAX_JOBS": "64"}
    built = source.build(environment=source.environment(**environment, TMPDIR=str(temporary)))
    assert "NVCC_APPEND_FLAGS= --threads 1\n" in built.output


@pytest.mark.parametrize(
    ("wish", "archs"),
    [
        ("90", ["90"]),
        ("8.0, 9.0 10.0;90", ["80", "90", "100"]),
        ("native", ["86", "90", "100"]),
        ("native;80", ["80", "86", "90", "100"]),
    ],
)
def test_architectures_are_those_named_or_those_of_the_gpus(source, tmp_path, wish, archs):
    program(tmp_path / "cuda/bin/nvcc")
    program(
        tmp_path / "bin/nvidia-smi",
        '#!/bin/sh\n[ "$1" = --query-gpu=compute_cap ] && printf "9.0\\n10.0\\n8.6\\n9.0\\n"\n',
    )
    path = os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]])
    environment = source.environment(CUDA_HOME=str(tmp_path / "cuda"), PATH=path, LEANOPS_CUDA_ARCHS=wish)
    built = source.build(environment=environment)
    assert built.report["cuda"] == {"built": True, "archs": archs}
    code = [word for word in built.command("zo_cuda.o") if word.startswith("-gencode")]
    expected = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    assert code == [*expected, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def test_native_asks_torch_where_nvidia_smi_fails_and_says_where_there_is_no_gpu(monkeypatch):
    answers = {"nvidia-smi": "", sys.executable: "9.0 8.9 9.0\n"}
    monkeypatch.setenv("LEANOPS_CUDA_ARCHS", "native")
    monkeypatch.setattr(toolchain, "ask", lambda name, *rest: answers[name])
    assert toolchain.cuda_archs() == ["89", "90"]
    monkeypatch.setenv("LEANOPS_CUDA_ARCHS", "sm_90")
    with pytest.raises(toolchain.Unavailable, match="must be native or architectures such as 80;90, got sm_90"):
        toolchain.cuda_archs()
    monkeypatch.setenv("LEANOPS_CUDA_ARCHS", "native")
    answers[sys.executable] = "\n"
    with pytest.raises(toolchain.Unavailable, match="native, and neither nvidia-smi nor torch finds a GPU"):
        toolchain.cuda_archs()


def test_what_is_asked_of_the_gpu_s_torch_is_valid_on_a_machine_without_one():
    done = subprocess.run([sys.executable, "-c", toolchain.CAPABILITIES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"(\d+\.\d+ ?)*\n", done.stdout)


def test_asking_a_program_that_fails_gives_nothing(tmp_path):
    fails = program(tmp_path / "nvidia-smi", "#!/bin/sh\necho 9.0\nexit 9\n")
    assert toolchain.ask(str(fails)) == ""
    assert toolchain.ask(str(tmp_path / "absent")) == ""
