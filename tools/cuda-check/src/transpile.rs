//! From a kernel to CUDA C++, by the steps of `CudaContext::compile_kernel` in `cubecl-cuda`.

use cubecl::ir::DeviceProperties;
use cubecl::prelude::CubeKernel;
use cubecl_cpp::shared::{CompilationOptions, CppCompiler};
use cubecl_cpp::target::Cuda;
use cubecl_server::kernel::{CompiledKernel, define_kernel};
use cubecl_server::validation::{validate_cube_dim, validate_units};

pub(crate) fn transpile(
    properties: &DeviceProperties,
    options: &CompilationOptions,
    kernel: &dyn CubeKernel,
) -> Result<CompiledKernel<CppCompiler<Cuda>>, String> {
    let id = kernel.id();
    validate_cube_dim(properties, &id).map_err(|e| e.to_string())?;
    validate_units(properties, &id).map_err(|e| e.to_string())?;
    let definition = define_kernel(kernel).map_err(|e| e.to_string())?;
    CompiledKernel::compile(kernel, definition, &mut CppCompiler::default(), options).map_err(|e| e.to_string())
}
