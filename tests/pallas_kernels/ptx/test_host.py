"""The launch recovered from host code: what Mosaic GPU of jax 0.11 dumps, in small."""

from __future__ import annotations

import pytest

from tests.pallas_kernels.ptx.errors import LaunchError, Unsupported
from tests.pallas_kernels.ptx.host import host_function, recover_launch
from tests.pallas_kernels.ptx.tensor_map import TensorMap

STRUCT = "!llvm.struct<(ptr, array<128 x i8>)>"
# Two buffers; a tensor map of 20 x 40 bfloat16 in the second, boxes of 8 x 32, swizzled in 64 bytes.
_REST = "%stream, %stream, %27) : (!llvm.ptr) -> i32"
HOST = f"""
// -----// IR Dump Before ReconcileUnrealizedCastsPass: reconcile ('builtin.module' operation: @f) //----- //
module @f {{
  llvm.func @f_mosaic_gpu(%arg0: !llvm.ptr loc(#l), %stream: !llvm.ptr loc(#l), %buffers: !llvm.ptr) -> i32 {{
    %0 = llvm.mlir.constant(4096 : i32) : i32 loc(#loc1)
    %1 = llvm.mlir.constant(1 : i64) : i64 loc(#loc1)
    %2 = llvm.mlir.constant(2 : i64) : i64 loc(#loc1)
    %3 = llvm.mlir.constant(40 : i64) : i64 loc(#loc1)
    %4 = llvm.mlir.constant(20 : i64) : i64 loc(#loc1)
    %5 = llvm.mlir.constant(8 : i64) : i64 loc(#loc1)
    %6 = llvm.mlir.constant(32 : i64) : i64 loc(#loc1)
    %7 = llvm.mlir.constant(7 : i64) : i64 loc(#loc1)
    %8 = llvm.mlir.constant(64 : i64) : i64 loc(#loc1)
    %9 = llvm.mlir.undef : !llvm.struct<(ptr, ptr, i64)> loc(#loc1)
    %10 = llvm.load %buffers : !llvm.ptr -> !llvm.ptr loc(#loc1)
    %11 = llvm.insertvalue %10, %9[1] : !llvm.struct<(ptr, ptr, i64)>  loc(#loc1)
    %12 = llvm.getelementptr %buffers[1] : (!llvm.ptr) -> !llvm.ptr, !llvm.ptr loc(#loc1)
    %13 = llvm.load %12 : !llvm.ptr -> !llvm.ptr loc(#loc1)
    %map = llvm.alloca %1 x !llvm.array<128 x i8> {{alignment = 64 : i64}} : (i64) -> !llvm.ptr loc(#loc1)
    %14 = llvm.ptrtoint %13 : !llvm.ptr to i64 loc(#loc1)
    %15 = llvm.inttoptr %14 : i64 to !llvm.ptr loc(#loc1)
    %16 = llvm.alloca %1 x !llvm.array<2 x i64> : (i32) -> !llvm.ptr loc(#loc1)
    llvm.store %4, %16 : i64, !llvm.ptr loc(#loc1)
    %17 = llvm.getelementptr %16[1] : (!llvm.ptr) -> !llvm.ptr, i64 loc(#loc1)
    llvm.store %3, %17 : i64, !llvm.ptr loc(#loc1)
    %18 = llvm.alloca %1 x !llvm.array<2 x i64> : (i32) -> !llvm.ptr loc(#loc1)
    llvm.store %3, %18 : i64, !llvm.ptr loc(#loc1)
    %19 = llvm.getelementptr %18[1] : (!llvm.ptr) -> !llvm.ptr, i64 loc(#loc1)
    llvm.store %1, %19 : i64, !llvm.ptr loc(#loc1)
    %20 = llvm.alloca %1 x !llvm.array<2 x i64> : (i32) -> !llvm.ptr loc(#loc1)
    llvm.store %5, %20 : i64, !llvm.ptr loc(#loc1)
    %21 = llvm.getelementptr %20[1] : (!llvm.ptr) -> !llvm.ptr, i64 loc(#loc1)
    llvm.store %6, %21 : i64, !llvm.ptr loc(#loc1)
    llvm.call @mosaic_gpu_init_tma_desc(%map, %15, %7, %2, %16, %18, %8, %20) : (!llvm.ptr) -> () loc(#loc1)
    %22 = llvm.load %map : !llvm.ptr -> !llvm.array<128 x i8> loc(#loc1)
    %23 = llvm.extractvalue %11[1] : !llvm.struct<(ptr, ptr, i64)>  loc(#loc1)
    %24 = llvm.alloca %1 x {STRUCT} : (i64) -> !llvm.ptr loc(#loc1)
    %25 = llvm.getelementptr %24[0, 0] : (!llvm.ptr) -> !llvm.ptr, {STRUCT} loc(#loc1)
    llvm.store %23, %25 : !llvm.ptr, !llvm.ptr loc(#loc1)
    %26 = llvm.getelementptr %24[0, 1] : (!llvm.ptr) -> !llvm.ptr, {STRUCT} loc(#loc1)
    llvm.store %22, %26 : !llvm.array<128 x i8>, !llvm.ptr loc(#loc1)
    %27 = llvm.alloca %1 x !llvm.array<2 x i64> : (i64) -> !llvm.ptr loc(#loc1)
    llvm.store %25, %27 : !llvm.ptr, !llvm.ptr loc(#loc1)
    %28 = llvm.getelementptr %27[1] : (!llvm.ptr) -> !llvm.ptr, !llvm.ptr loc(#loc1)
    llvm.store %26, %28 : !llvm.ptr, !llvm.ptr loc(#loc1)
    %29 = llvm.trunc %8 : i64 to i32 loc(#loc1)
    %30 = llvm.call @mosaic_gpu_launch_kernel(%arg0, %4, %2, %1, %2, %1, %1, %29, %1, %1, %0, {_REST} loc(#l)
    llvm.return %30 : i32 loc(#loc1)
  }}
}}
"""
BUFFERS = [0x1000, 0x2000]
_LINE = "    %14 = llvm.ptrtoint %13 : !llvm.ptr to i64 loc(#loc1)\n"


def test_grid_parameters_and_tensor_maps():
    launch = recover_launch(host_function(HOST), BUFFERS)
    assert (launch.grid, launch.cluster, launch.block) == ((20, 2, 1), (2, 1, 1), (64, 1, 1))
    assert launch.shared_bytes == 4096
    assert launch.parameters == (0x1000, {0: TensorMap(0x2000, 2, (40, 20), (2, 80), (32, 8), 64)})


def test_a_launch_of_an_older_version():
    older = HOST.replace("%stream, %stream, %27", "%stream, %27")
    assert recover_launch(host_function(older), BUFFERS) == recover_launch(host_function(HOST), BUFFERS)


def test_tensor_maps_are_checked():
    with pytest.raises(LaunchError, match="base not aligned"):
        recover_launch(host_function(HOST), [0x1000, 0x2008])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("ReconcileUnrealizedCastsPass", "SomePass", "no module before"),
        ("@f_mosaic_gpu(", "@f_other(", "no host function"),
        ("%stream: !llvm.ptr loc(#l), ", "", "KeyError|arguments"),
        (_LINE, _LINE.replace("ptrtoint", "fneg"), "unknown operation fneg"),
        (_LINE, "", "%14"),
        ("llvm.call @mosaic_gpu_launch_kernel", "llvm.call @other_launch", "unknown call of 14"),
        ("%stream, %stream, %27", "%27", "unknown call of 12"),
        ("%30 = llvm.call @mosaic_gpu_launch_kernel", "// llvm.call @x", "launches nothing"),
    ],
)
def test_host_code_of_another_form_is_refused(old, new, message):
    assert old in HOST
    with pytest.raises(Unsupported, match=message):
        recover_launch(host_function(HOST.replace(old, new)), BUFFERS)
