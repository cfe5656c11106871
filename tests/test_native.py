"""The compiled module: which instruction set, how many cores."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from jaxtyping import TypeCheckError

from terseformer import _native, native

ALL_ISAS = ("scalar", "avx2", "avx512", "neon")
SUPPORTED = native.supported_isas()


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh process: the instruction set is chosen once in each."""
    inherited = {name: value for name, value in os.environ.items() if name != "TERSE_ISA"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def chosen_isa(**environment: str) -> subprocess.CompletedProcess[str]:
    return run_python("from terseformer import native; print(native.isa(), native.isa())", **environment)


def test_supported_isas_start_with_scalar_and_are_known() -> None:
    assert SUPPORTED[0] == "scalar"
    assert len(set(SUPPORTED)) == len(SUPPORTED)
    assert set(SUPPORTED) <= set(ALL_ISAS)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs /proc/cpuinfo")
def test_supported_isas_agree_with_the_kernel() -> None:
    words = set(Path("/proc/cpuinfo").read_text().split())
    expected = ["scalar"]
    if {"avx2", "fma"} <= words:
        expected.append("avx2")
        if {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"} <= words:
            expected.append("avx512")
    if "asimd" in words:
        expected.append("neon")
    assert list(SUPPORTED) == expected


@pytest.mark.parametrize("environment", [{}, {"TERSE_ISA": ""}], ids=["unset", "empty"])
def test_isa_is_the_fastest_by_default(environment: dict[str, str]) -> None:
    result = chosen_isa(**environment)
    assert result.stdout.split() == [SUPPORTED[-1]] * 2, result.stderr


@pytest.mark.parametrize("isa", SUPPORTED)
def test_terse_isa_forces_each_supported_one(isa: str) -> None:
    result = chosen_isa(TERSE_ISA=isa)
    assert result.stdout.split() == [isa] * 2, result.stderr


@pytest.mark.parametrize("isa", [*(isa for isa in ALL_ISAS if isa not in SUPPORTED), "AVX2", "sse9"])
def test_terse_isa_refuses_what_is_missing_and_names_what_is_there(isa: str) -> None:
    result = chosen_isa(TERSE_ISA=isa)
    assert result.returncode == 1
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith(f"ValueError: TERSE_ISA={isa} is not an instruction set")
    assert message.endswith("one of: " + ", ".join(SUPPORTED))


def test_a_bad_terse_isa_does_not_break_the_import() -> None:
    result = run_python("from terseformer import native; print(native.physical_cores())", TERSE_ISA="sse9")
    assert int(result.stdout) >= 1, result.stderr


def test_a_team_refuses_a_bad_terse_isa_before_it_works() -> None:
    result = run_python("from terseformer import native; native.Floors(2)", TERSE_ISA="sse9")
    assert result.returncode == 1, result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("ValueError: TERSE_ISA=sse9 is not an instruction set")


SHORT_OF_MEMORY = """
import resource
from pathlib import Path
from terseformer import native
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20), resource.RLIM_INFINITY))
native.Floors(1000)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc/self/statm")
def test_threads_that_cannot_be_started_are_an_error() -> None:
    result = run_python(SHORT_OF_MEMORY)
    assert result.returncode == 1, result.stderr
    assert "RuntimeError: 1000 threads cannot be started" in result.stderr


def test_a_missing_compiled_module_says_what_to_do(tmp_path: Path) -> None:
    package = tmp_path / "terseformer"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "native.py").write_text(Path(native.__file__).read_text())
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}]; sys.meta_path[:] = sys.meta_path[-3:]; "
    result = run_python(code + "import terseformer.native", PYTHONPATH="")
    assert result.stderr.strip().endswith("run `make setup`")


def make_root(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture
def allowed() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else pytest.skip("Linux only")


@pytest.mark.usefixtures("allowed")
@pytest.mark.parametrize(
    "files",
    [
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"},
        {"proc/self/cgroup": "0::/user/me\n", "sys/fs/cgroup/user/cpu.max": "100000 100000\n"},
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
            "sys/fs/cgroup/a/cpu.max": "50000 100000\n",
        },
        {
            "proc/self/cgroup": "9:memory:/x\n4:cpu,cpuacct:/docker/0\n0::/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "199999\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    ],
    ids=["v2-container", "v2-parent", "v2-tightest", "v1-container"],
)
def test_physical_cores_keep_to_a_quota_rounded_down(tmp_path: Path, files: dict[str, str]) -> None:
    assert native.physical_cores(make_root(tmp_path, files)) == 1


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"},
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "9900000000 100000\n"},
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "rubbish\n"},
        {
            "proc/self/cgroup": "4:cpu:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        {"proc/self/cgroup": "1:cpuset:/\nrubbish\n", "sys/fs/cgroup/cpu.max": "100000 100000\n"},
    ],
    ids=["no-files", "v2-max", "v2-plenty", "v2-rubbish", "v1-unlimited", "other-controller"],
)
def test_physical_cores_without_a_limit_are_the_allowed_cpus(
    tmp_path: Path, allowed: int, files: dict[str, str]
) -> None:
    assert native.physical_cores(make_root(tmp_path, files)) == allowed


@pytest.mark.usefixtures("allowed")
def test_physical_cores_count_the_threads_of_a_core_once(tmp_path: Path) -> None:
    cpus = os.sched_getaffinity(0)
    siblings = ",".join(str(cpu) for cpu in sorted(cpus))
    files = {f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": siblings for cpu in cpus}
    assert native.physical_cores(make_root(tmp_path, files)) == 1


@pytest.mark.usefixtures("allowed")
def test_physical_cores_keep_to_the_affinity_mask() -> None:
    code = """
        import os
        from terseformer import native
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        print(native.physical_cores())
    """
    result = run_python("\n".join(line.strip() for line in code.splitlines()))
    assert result.stdout.strip() == "1", result.stderr


def test_the_stub_names_what_the_module_has() -> None:
    stub = ast.parse(Path(native.__file__).with_name("_native.pyi").read_text())
    declared = {node.name: node for node in stub.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert set(declared) == {name for name in vars(_native) if not name.startswith("_")}
    for name, node in declared.items():
        if isinstance(node, ast.ClassDef):
            members = {member.name for member in node.body if isinstance(member, ast.FunctionDef)}
            assert members - {"__init__"} == {member for member in vars(getattr(_native, name)) if member[0] != "_"}


def test_annotations_are_checked_when_called() -> None:
    with pytest.raises(TypeCheckError):
        native.physical_cores(1)
