//! One kernel through the whole way: tensor cores, and more shared memory than a block has without asking.
//!
//! They need NVIDIA's compilers, which `.ci/cuda` fetches: `.ci/cuda cargo test --manifest-path tools/cuda-check/Cargo.toml --release -- --ignored`.

use cubecl::prelude::*;
use half::{bf16, f16};
use std::sync::Arc;
use thalweg_cuda_check::{Arch, Kernel, Recorder, Toolchain};

/// `out = a b^T` of 16 x 16 tiles by way of shared memory, of which there are `elements` in all.
#[cube(launch)]
fn tile_product<E: Float>(a: &[E], b: &[E], out: &mut [f32], #[comptime] elements: usize) {
    let mut stage = Shared::<[E]>::new_slice(elements);
    let mut i = UNIT_POS as usize;
    while i < 256 {
        stage[i] = a[i];
        stage[elements - 256 + i] = b[i];
        i += CUBE_DIM as usize;
    }
    sync_cube();
    let left = cmma::Matrix::<E>::from_slice(
        cmma::MatrixIdent::A,
        16usize,
        16usize,
        16usize,
        cmma::MatrixLayout::RowMajor,
        &stage[0..256],
        16,
    );
    let right = cmma::Matrix::<E>::from_slice(
        cmma::MatrixIdent::B,
        16usize,
        16usize,
        16usize,
        cmma::MatrixLayout::ColMajor,
        &stage[elements - 256..elements],
        16,
    );
    let sum = cmma::Matrix::<f32>::from_value(
        cmma::MatrixIdent::Accumulator,
        16usize,
        16usize,
        16usize,
        cmma::MatrixLayout::Undefined,
        0.0,
    );
    cmma::execute(&left, &right, &sum, &sum);
    cmma::store(out, &sum, 16, cmma::MatrixLayout::RowMajor);
}

fn launch<E: Float + CubeElement>(recorder: &Recorder, elements: usize) {
    recorder.case(std::any::type_name::<E>(), |client| {
        let buffer = |bytes| unsafe { BufferArg::from_raw_parts(client.empty(bytes), 256) };
        let (count, threads) = (CubeCount::Static(1, 1, 1), CubeDim::new_1d(32));
        tile_product::launch::<E>(client, count, threads, buffer(512), buffer(512), buffer(1024), elements);
    });
}

fn recorded(arch: Arch, launches: impl FnOnce(&Recorder)) -> Vec<Kernel> {
    let toolchain = Toolchain::from_env().unwrap_or_else(|e| panic!("{e}"));
    let recorder = Recorder::new(arch, Arc::new(toolchain), false);
    launches(&recorder);
    recorder.kernels()
}

#[test]
#[ignore = "needs NVIDIA's compilers: .ci/cuda"]
fn a_kernel_is_compiled_once_per_device_and_element_type() {
    for arch in Arch::ALL {
        let kernels = recorded(arch, |recorder| {
            for _ in 0..2 {
                launch::<bf16>(recorder, 32 << 10);
                launch::<f16>(recorder, 32 << 10);
            }
        });
        print!("{}", thalweg_cuda_check::table(&kernels));
        assert_eq!(kernels.len(), 2);
        for kernel in &kernels {
            assert!(kernel.passes(), "{:?}", kernel.outcome);
            assert_eq!((kernel.name.as_str(), kernel.threads, kernel.dynamic_shared), ("tile_product_e", 32, 64 << 10));
            assert!(kernel.ptx.contains(&format!(".target {}", arch.target())));
            assert!(kernel.ptx.contains("wmma.mma.sync"), "no tensor cores");
        }
    }
}

#[test]
#[ignore = "needs NVIDIA's compilers: .ci/cuda"]
fn what_fits_one_device_need_not_fit_another() {
    let passes = |arch| recorded(arch, |recorder| launch::<bf16>(recorder, 100 << 10))[0].passes();
    assert!(passes(Arch::Sm90) && !passes(Arch::Sm80));
}
