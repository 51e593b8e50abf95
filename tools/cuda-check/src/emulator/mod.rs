//! A device that runs the CUDA C++ of kernels on the CPU.
//!
//! The source that NVRTC would get is compiled by the machine's `g++` behind a header that stands for CUDA: a block's
//! threads take turns, and matrix units are loops. Memory is fenced off at its end, shared memory begins as NaN, matrices
//! must be aligned as the hardware wants them. What is not seen: PTX, the order of a warp's threads, and time.

mod memory;
mod ptx;

use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_void};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, LazyLock, Mutex, OnceLock};

use cubecl::bytes::Bytes;
use cubecl::ir::{DeviceIdentity, DeviceProperties};
use cubecl::prelude::{CubeCount, CubeKernel, KernelId};
use cubecl_server::memory_management::{ManagedMemoryHandle, ManagedMemoryId};
use cubecl_server::server::{BufferBinding, CopyDescriptor, KernelArguments, KernelResource};
use libloading::Library;
use thalweg_gpu::Client;

use crate::device::Arch;
use crate::server::{HostServer, Work, lock};
use crate::transpile::transpile;
use memory::Memory;

/// A client of a new device like `arch`. Devices run side by side and share their compiled kernels.
pub fn emulator(arch: Arch) -> Client {
    let mut properties = arch.properties();
    // A name that promises no PTX.
    let name = format!("compute capability {}.{}, emulated", arch.version() / 10, arch.version() % 10);
    properties.identity = DeviceIdentity { fingerprint: name.clone(), name, physical: None };
    // A short axis: a CPU tells soon what happens beyond its end.
    properties.hardware.max_cube_count.0 = 1024;
    // Few multiprocessors: some sequences fill them already, and what is selected for many is seen too.
    properties.hardware.num_streaming_multiprocessors = Some(8);
    HostServer::client(properties, Emulator { arch, memory: HashMap::new(), failure: None }).into()
}

struct Emulator {
    arch: Arch,
    memory: HashMap<ManagedMemoryId, Memory>,
    /// What went wrong first. From then on nothing runs, and whoever reads is told.
    failure: Option<String>,
}

const UNALLOCATED: &str = "a buffer that was never allocated";

/// A kernel, as code, or why it is none.
type Compiled = Result<Loaded, String>;

struct Loaded {
    /// Its variables are those of one launch.
    library: Mutex<Library>,
    name: String,
    shared: usize,
}

/// A place for each kernel, which all emulators share: whoever asks first compiles it, while others compile other ones.
type Kernels = Mutex<HashMap<(Arch, KernelId), Arc<OnceLock<Compiled>>>>;

static KERNELS: LazyLock<Kernels> = LazyLock::new(Kernels::default);

/// Arguments, blocks along each axis, threads of a block, bytes of shared memory; gives what went wrong.
type Run = unsafe extern "C" fn(*const *const c_void, *const u32, u32, usize) -> *const c_char;

impl Emulator {
    fn compile(&self, properties: &DeviceProperties, kernel: &dyn CubeKernel) -> Compiled {
        let compiled = transpile(properties, &self.arch.options((12, 0)), kernel)?;
        let folder = tempfile::tempdir().map_err(|e| e.to_string())?;
        let file = folder.path().join("kernel.so");
        compile(&host_source(&compiled.source, &compiled.entrypoint_name)?, &file)?;
        // Safety: the library has no initialisers but those of the C++ library. Once mapped it needs its file no more.
        let library = Mutex::new(unsafe { Library::new(&file) }.map_err(|e| e.to_string())?);
        let shared = compiled.repr.map_or(0, |repr| repr.shared_memory_size);
        Ok(Loaded { library, name: compiled.entrypoint_name, shared })
    }

    fn address(&self, buffer: &BufferBinding) -> Result<*const c_void, String> {
        let memory = self.memory.get(&buffer.memory.id()).ok_or(UNALLOCATED)?;
        Ok(memory.at(buffer.range().start as usize).cast())
    }

    fn run(
        &mut self,
        properties: &DeviceProperties,
        kernel: &dyn CubeKernel,
        count: CubeCount,
        arguments: KernelArguments,
    ) -> Result<(), String> {
        let CubeCount::Static(x, y, z) = count else { return Err("a count in memory".into()) };
        let mut addresses = Vec::new();
        for resource in &arguments.resources {
            let KernelResource::Buffer(buffer) = resource else { return Err("a tensor map".into()) };
            addresses.push(self.address(buffer)?);
        }
        let info = &arguments.info;
        if info.dynamic_metadata_offset < info.data.len() {
            addresses.push(info.data[info.dynamic_metadata_offset..].as_ptr().cast());
        }
        // As in CUDA, addresses of arguments: of the pointers, and of the structure with all numbers.
        let mut pointers: Vec<*const c_void> =
            addresses.iter().map(|address| std::ptr::from_ref(address).cast()).collect();
        pointers.push(info.data.as_ptr().cast());
        let threads = kernel.id().cube_dim.num_elems();
        let place = lock(&KERNELS).entry((self.arch, kernel.id())).or_default().clone();
        let loaded = place.get_or_init(|| self.compile(properties, kernel)).as_ref().map_err(String::clone)?;
        let library = lock(&loaded.library);
        // Safety: `host_source` defines it so; that the kernel stays within its arguments is what this is there to see.
        let failure = unsafe {
            let run = library.get::<Run>(b"run\0").map_err(|e| e.to_string())?;
            run(pointers.as_ptr(), [x, y, z].as_ptr(), threads, loaded.shared)
        };
        if failure.is_null() {
            return Ok(());
        }
        // Safety: a string of the library, which stays loaded.
        let why = unsafe { CStr::from_ptr(failure) }.to_string_lossy();
        Err(format!("{}: {why}", loaded.name))
    }
}

/// CUDA C++ as C++ for the CPU, with a function `run`.
fn host_source(source: &str, kernel: &str) -> Result<String, String> {
    let mut out = String::from(include_str!("cuda.hpp"));
    let source = ptx::replace(source)?;
    // The names of integers and the headers are the machine's own.
    let kept = source.lines().filter(|line| {
        let integer = line.starts_with("typedef") && line.ends_with("_t;");
        !integer && !line.starts_with("#include")
    });
    for line in kept {
        match line.split_once("extern __shared__ ") {
            None => out.push_str(line),
            Some((before, declaration)) => {
                let (name, after) = declaration
                    .split_once(" char ")
                    .and_then(|(_, rest)| rest.split_once("[];"))
                    .ok_or_else(|| format!("shared memory that is declared as `{declaration}`"))?;
                out.push_str(&format!("{before}char* const {name} = emulator::shared;{after}"));
            }
        }
        out.push('\n');
    }
    out.push_str(&format!(
        "
extern \"C\" const char* run(void** arguments, const unsigned* grid, unsigned threads, size_t shared) {{
    return emulator::launch([](void** a) {{ emulator::call({kernel}, a); }}, arguments, grid, threads, shared);
}}
"
    ));
    Ok(out)
}

fn compile(source: &str, library: &Path) -> Result<(), String> {
    let file = library.with_extension("cpp");
    fs::write(&file, source).map_err(|e| e.to_string())?;
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "g++".into());
    let output = Command::new(&compiler)
        .args(["-std=c++17", "-O1", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing", "-w"])
        .args(["-shared", "-fPIC", "-o"])
        .arg(library)
        .arg(&file)
        .output()
        .map_err(|e| format!("cannot run {}: {e}", compiler.display()))?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

impl Work for Emulator {
    fn launch(
        &mut self,
        properties: &DeviceProperties,
        kernel: &dyn CubeKernel,
        count: CubeCount,
        arguments: KernelArguments,
    ) {
        if self.failure.is_none() {
            self.failure = self.run(properties, kernel, count, arguments).err();
        }
    }

    fn allocate(&mut self, handle: ManagedMemoryHandle, size: usize) {
        // Handles that no one holds any more give their memory back.
        self.memory.retain(|_, memory| memory.in_use());
        let binding = handle.binding();
        self.memory.insert(binding.id(), Memory::new(size, binding.downgrade()));
    }

    fn read(&self, from: &CopyDescriptor) -> Result<Bytes, String> {
        let memory = self.memory.get(&from.handle.memory.id()).ok_or(UNALLOCATED)?;
        Ok(Bytes::from_bytes_vec(memory.bytes(from.handle.range()).to_vec()))
    }

    fn write(&mut self, to: &CopyDescriptor, bytes: &[u8]) {
        match self.memory.get_mut(&to.handle.memory.id()) {
            Some(memory) => memory.write(to.handle.range(), bytes),
            None => self.failure = Some(UNALLOCATED.into()),
        }
    }

    fn state(&self) -> Result<(), String> {
        self.failure.clone().map_or(Ok(()), Err)
    }
}
