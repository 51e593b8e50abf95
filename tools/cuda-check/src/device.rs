//! What CubeCL's CUDA runtime says of a device, here said of one that is not there.
//!
//! Kernels choose their configuration from these properties, so they follow `cubecl-cuda` 0.11.3 (`runtime.rs`) line by
//! line where a kernel can notice. That crate itself is no dependency: it brings LLVM, which its build script downloads.

use cubecl::ir::features::{AtomicUsage, Plane, Tma, TypeUsage};
use cubecl::ir::{
    ContiguousElements, DeviceIdentity, DeviceProperties, ElemType, FloatKind, HardwareProperties,
    MemoryDeviceProperties, MmaProperties, OpaqueType, TargetProperties, Type, VectorSize,
};
use cubecl::prelude::cmma::MatrixLayout;
use cubecl::profile::TimingMethod;
use cubecl_cpp::cuda::arch::CudaArchitecture;
use cubecl_cpp::cuda::mma::{CudaCmmaCompiler, manual::contiguous_elements_cuda};
use cubecl_cpp::cuda::supported_mma_combinations;
use cubecl_cpp::register_supported_types;
use cubecl_cpp::shared::{CompilationOptions, CppSupportedFeatures, register_mma_features, register_wmma_features};

/// A device to compile for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Arch {
    /// Compute capability 8.0: A100.
    Sm80,
    /// Compute capability 9.0: H100, H200.
    Sm90,
}

impl Arch {
    /// All that the check compiles for.
    pub const ALL: [Arch; 2] = [Arch::Sm80, Arch::Sm90];

    /// Ten times the compute capability.
    pub fn version(self) -> u32 {
        match self {
            Arch::Sm80 => 80,
            Arch::Sm90 => 90,
        }
    }

    /// NVRTC's and `ptxas`'s name; on Hopper CubeCL compiles for the features that later devices do not have.
    pub fn target(self) -> &'static str {
        match self {
            Arch::Sm80 => "sm_80",
            Arch::Sm90 => "sm_90a",
        }
    }

    /// Bytes of shared memory that one block may ask for.
    pub fn shared_memory(self) -> usize {
        match self {
            Arch::Sm80 => 163 << 10,
            Arch::Sm90 => 227 << 10,
        }
    }

    /// Multiprocessors.
    fn multiprocessors(self) -> u32 {
        match self {
            Arch::Sm80 => 108,
            Arch::Sm90 => 132,
        }
    }

    /// Blocks of `threads` threads that run on one multiprocessor at once.
    pub fn blocks(self, threads: u32, registers: u32, shared: usize) -> u32 {
        // Registers come in units of 256 per warp; each block pays 1 KiB of shared memory for itself.
        let warps = threads.div_ceil(32);
        let by_registers = 65536 / ((registers * 32).next_multiple_of(256) * warps).max(1);
        let by_shared = (self.shared_memory() + 1024) / (shared + 1024).next_multiple_of(128);
        by_registers.min(by_shared as u32).min(64 / warps.max(1)).min(32)
    }

    /// The properties by which kernels choose their configuration.
    pub fn properties(self) -> DeviceProperties {
        let version = self.version();
        let arch = CudaArchitecture { version, tensor_cores: true };
        let memory = MemoryDeviceProperties::new(20 << 30, 512).with_max_memory(80 << 30);
        let hardware = HardwareProperties {
            load_width: 128,
            vector_register_count: None,
            plane_size_min: 32,
            plane_size_max: 32,
            max_bindings: 1024,
            max_shared_memory_size: self.shared_memory(),
            max_cube_count: (i32::MAX as u32, 65535, 65535),
            max_units_per_cube: 1024,
            max_cube_dim: (1024, 1024, 64),
            num_streaming_multiprocessors: Some(self.multiprocessors()),
            num_tensor_cores: Some(4),
            min_tensor_cores_dim: Some(8),
            num_cpu_cores: None,
            last_level_cache_size: None,
            max_vector_size: VectorSize::MAX,
            cube_mma_reserved_shared_memory: 0,
        };
        let identity = DeviceIdentity {
            name: format!("compute capability {}.{}, compile only", version / 10, version % 10),
            fingerprint: format!("ptx_sm{version}"),
            physical: None,
        };
        let mut p = DeviceProperties::new(Default::default(), memory, hardware, TimingMethod::System, identity);

        register_supported_types(&mut p);
        let [f16, bf16] = [FloatKind::F16, FloatKind::BF16].map(ElemType::Float);
        p.register_type_usage(ElemType::Float(FloatKind::TF32), TypeUsage::Conversion);
        let writes = AtomicUsage::Add | AtomicUsage::LoadStore | AtomicUsage::Exchange;
        p.register_atomic_type_usage(Type::atomic(ElemType::Float(FloatKind::F64)), writes);
        p.register_atomic_type_usage(Type::atomic(f16), AtomicUsage::Add);
        p.register_atomic_type_usage(Type::atomic(Type::new(f16).with_vector_size(2)), writes);
        p.register_opaque_type(OpaqueType::Barrier);
        for plane in [Plane::Sync, Plane::Ops, Plane::NonUniformControlFlow] {
            p.features.plane.insert(plane);
        }
        for elem in [f16, bf16] {
            p.features.matmul.ldmatrix.insert(elem);
        }
        p.features.copy_async = true;
        p.features.memory_reinterpret = true;
        p.features.alignment = true;
        p.features.device_memory_scope = true;
        if self == Arch::Sm90 {
            p.features.tma.insert(Tma::Base);
            p.register_opaque_type(OpaqueType::TensorMap);
            p.features.cube_cluster = true;
            for elem in [f16, bf16] {
                p.features.matmul.stmatrix.insert(elem);
                for width in [2, 4, 8] {
                    p.register_atomic_type_usage(Type::atomic(Type::new(elem).with_vector_size(width)), writes);
                }
            }
        }
        register_wmma_features(CudaCmmaCompiler::Cpp.supported_cmma_combinations(&arch), &mut p);
        register_mma_features(supported_mma_combinations(&arch), &mut p);
        p
    }

    /// How CubeCL writes CUDA C++ for the device, with an NVRTC of this version.
    pub fn options(self, nvrtc: (i32, i32)) -> CompilationOptions {
        let hopper = self == Arch::Sm90;
        CompilationOptions {
            warp_size: 32,
            supports_features: CppSupportedFeatures {
                grid_constants: true,
                clusters: hopper,
                fast_math: true,
                fast_tanh: nvrtc >= (12, 8),
                elect_sync: hopper,
                dp4a: true,
            },
            amd_wmma: None,
        }
    }
}

/// The layout of tensor-core fragments, as of any CUDA device.
pub(crate) fn target_properties() -> TargetProperties {
    TargetProperties {
        mma: MmaProperties {
            register_size_bits: 32,
            const_plane_size: 32,
            register_layout_a: MatrixLayout::RowMajor,
            register_layout_b: MatrixLayout::ColMajor,
            register_layout_acc: MatrixLayout::RowMajor,
            register_duplication_a: 1,
            register_duplication_b: 1,
            register_duplication_acc: 1,
            contiguous_elements: ContiguousElements::new(contiguous_elements_cuda),
        },
    }
}
