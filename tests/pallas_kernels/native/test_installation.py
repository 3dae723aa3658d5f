"""Where native kernels cannot run, ``auto`` takes the reference and says why, and asking for them raises."""

from __future__ import annotations

import subprocess
import sys

import jax.numpy as jnp
import pytest

from pallas_kernels import ActivationFormat, quantize, use_implementation
from pallas_kernels.dispatch import Unsupported, record_choices
from pallas_kernels.native import build
from pallas_kernels.native.config import NativeConfig
from pallas_kernels.native.instruction_sets import INSTRUCTION_SETS, available
from tests.pallas_kernels.verification.hopper import DEVICE, hopper

FORMAT = ActivationFormat(32, 0)


@pytest.mark.parametrize(
    ("version", "found"),
    [((1, 0), "1.0"), ((0, 2), "0.2"), ((0, 6), "0.6"), ((-1, -1), "no version that is known")],
)
def test_another_version_of_xlas_ffi(monkeypatch: pytest.MonkeyPatch, version: tuple[int, int], found: str):
    monkeypatch.setattr(build, "api_version", lambda: version)
    lack = f"native_cpu needs a jaxlib with version 0.3 to 0.5 of XLA's FFI, the installed one has {found}"
    with record_choices() as choices:
        quantize(jnp.ones((2, 32)), FORMAT)
    assert choices[0].implementation == "reference"
    assert choices[0].reason.split("; ")[-1] == lack
    with use_implementation("native_cpu"), pytest.raises(Unsupported) as raised:
        quantize(jnp.ones((2, 32)), FORMAT)
    assert str(raised.value) == f"quantize: {lack}"


def test_the_installed_version_of_xlas_ffi_is_known():
    assert build.api_version() in build.API_VERSIONS
    assert build.unsupported() is None


def test_an_installation_without_numba():
    """In a process that can import neither numba nor llvmlite."""
    script = """if True:
        import sys
        sys.modules |= {"numba": None, "llvmlite": None}
        import jax.numpy as jnp
        from pallas_kernels import ActivationFormat, quantize, use_implementation
        from pallas_kernels.dispatch import Unsupported, record_choices
        with record_choices() as choices:
            quantize(jnp.ones((2, 32)), ActivationFormat(32, 0))
        print(choices[0].implementation, choices[0].reason, sep=": ")
        for name in ("native_cpu", "abacus"):
            try:
                with use_implementation(name):
                    quantize(jnp.ones((2, 32)), ActivationFormat(32, 0))
            except Unsupported as error:
                print(error)
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "reference: mosaic_sm90 needs compute capability 9.0, this is cpu; "
        "native_cpu needs numba, which is not installed",
        "quantize: native_cpu needs numba, which is not installed",
        "quantize has no implementation 'abacus'; it has: mosaic_sm90, native_cpu, reference",
    ]


def test_a_gpu(tmp_path):
    with (
        hopper(tmp_path),
        use_implementation("native_cpu"),
        pytest.raises(Unsupported, match=f"quantize: native_cpu needs a CPU, this is {DEVICE}"),
    ):
        quantize(jnp.ones((2, 32)), FORMAT)


def test_every_cpu_has_the_generic_instruction_set():
    assert available()[-1] == "generic" and set(available()) <= INSTRUCTION_SETS.keys()


def test_an_instruction_set_that_this_cpu_does_not_have():
    missing = [name for name in INSTRUCTION_SETS if name not in available()]
    for name in (*missing, "abacus"):
        with pytest.raises(
            ValueError, match=f"no instruction set '{name}' on this CPU, which has: .*generic"
        ):
            NativeConfig(name)
