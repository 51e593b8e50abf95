//! A device that runs the CUDA C++ of kernels on the CPU.
//!
//! The source that NVRTC would get is compiled by the machine's `g++` behind a header that stands for CUDA: a block's
//! threads take turns, and matrix units are loops. Memory is fenced off at its end, shared memory begins as NaN, matrices
//! must be aligned as the hardware wants them. What is not seen: PTX, the order of a warp's threads, and time.

mod memory;

use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_void};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use cubecl::bytes::Bytes;
use cubecl::client::Client;
use cubecl::future::DynFut;
use cubecl::ir::DeviceIdentity;
use cubecl::prelude::{CubeCount, CubeKernel, KernelId};
use cubecl::profile::ProfileDuration;
use cubecl_common::device::{DeviceId, DeviceService, ServerUtilitiesHandle, ServiceId};
use cubecl_environment::stream::StreamId;
use cubecl_server::allocator::ContiguousMemoryLayoutPolicy;
use cubecl_server::dry_run::LaunchMode;
use cubecl_server::logging::ServerLogger;
use cubecl_server::memory_management::{
    ManagedMemoryHandle, ManagedMemoryId, MemoryAllocationMode, StreamMemoryReport,
};
use cubecl_server::server::{
    BufferBinding, CopyDescriptor, KernelArguments, KernelResource, ProfileError, ProfilingToken, Server,
    ServerCommunication, ServerError, ServerStorage, ServerUtilities,
};
use cubecl_server::storage::{BytesResource, BytesStorage, ManagedResource};
use cubecl_server::timestamp_profiler::TimestampProfiler;
use libloading::Library;
use tempfile::TempDir;

use crate::device::{Arch, target_properties};
use crate::transpile::transpile;
use memory::Memory;

/// A client of a device like `arch`.
///
/// # Errors
/// If there is no folder for compiled kernels.
pub fn emulator(arch: Arch) -> std::io::Result<Client> {
    static DEVICES: AtomicU16 = AtomicU16::new(0);
    let device = DeviceId::new(1, DEVICES.fetch_add(1, Ordering::Relaxed));
    let server = Emulator::new(device, arch)?;
    Ok(Client::init(device, server))
}

struct Emulator {
    arch: Arch,
    utilities: Arc<ServerUtilities>,
    kernels: HashMap<KernelId, Loaded>,
    memory: HashMap<ManagedMemoryId, Memory>,
    folder: TempDir,
    /// What went wrong first. From then on nothing runs, and whoever reads is told.
    failure: Option<String>,
    timestamps: TimestampProfiler,
}

/// A kernel, as code.
struct Loaded {
    library: Library,
    name: String,
    shared: usize,
}

/// Arguments, blocks along each axis, threads of a block, bytes of shared memory; gives what went wrong.
type Run = unsafe extern "C" fn(*const *const c_void, *const u32, u32, usize) -> *const c_char;

impl std::fmt::Debug for Emulator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Emulator").field("arch", &self.arch).finish_non_exhaustive()
    }
}

impl Emulator {
    fn new(device: DeviceId, arch: Arch) -> std::io::Result<Self> {
        let mut properties = arch.properties();
        // A name that promises no PTX.
        let name = format!("compute capability {}.{}, emulated", arch.version() / 10, arch.version() % 10);
        properties.identity = DeviceIdentity { fingerprint: name.clone(), name, physical: None };
        // A short axis: a CPU tells soon what happens beyond its end.
        properties.hardware.max_cube_count.0 = 1024;
        let alignment = properties.memory.alignment as usize;
        let (utilities, _) = ServerUtilities::init(
            ServiceId::of::<Self>(device),
            "cuda",
            properties,
            target_properties(),
            Arc::new(ServerLogger::default()),
            ContiguousMemoryLayoutPolicy::new(alignment),
        );
        Ok(Self {
            arch,
            utilities: Arc::new(utilities),
            kernels: HashMap::new(),
            memory: HashMap::new(),
            folder: tempfile::tempdir()?,
            failure: None,
            timestamps: TimestampProfiler::default(),
        })
    }

    /// The kernel as code, compiled when it is first asked for.
    fn load(&mut self, id: &KernelId, kernel: &dyn CubeKernel) -> Result<&Loaded, String> {
        if !self.kernels.contains_key(id) {
            let compiled = transpile(&self.utilities.properties, &self.arch.options((12, 0)), kernel)?;
            let file = self.folder.path().join(format!("{}.so", self.kernels.len()));
            compile(&host_source(&compiled.source, &compiled.entrypoint_name)?, &file)?;
            // Safety: the library has no initialisers but those of the C++ library.
            let library = unsafe { Library::new(&file) }.map_err(|e| e.to_string())?;
            let shared = compiled.repr.map_or(0, |repr| repr.shared_memory_size);
            self.kernels.insert(id.clone(), Loaded { library, name: compiled.entrypoint_name, shared });
        }
        Ok(&self.kernels[id])
    }

    fn address(&self, buffer: &BufferBinding) -> Result<*const c_void, String> {
        let memory = self.memory.get(&buffer.memory.id()).ok_or("a buffer that was never allocated")?;
        Ok(memory.at(buffer.range().start as usize).cast())
    }

    fn run(&mut self, kernel: &dyn CubeKernel, count: CubeCount, arguments: KernelArguments) -> Result<(), String> {
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
        let id = kernel.id();
        let threads = id.cube_dim.num_elems();
        let loaded = self.load(&id, kernel)?;
        // Safety: `host_source` defines it so; that the kernel stays within its arguments is what this is there to see.
        let failure = unsafe {
            let run = loaded.library.get::<Run>(b"run\0").map_err(|e| e.to_string())?;
            run(pointers.as_ptr(), [x, y, z].as_ptr(), threads, loaded.shared)
        };
        if failure.is_null() {
            return Ok(());
        }
        // Safety: a string of the library, which stays loaded.
        let why = unsafe { CStr::from_ptr(failure) }.to_string_lossy();
        Err(format!("{}: {why}", loaded.name))
    }

    fn state(&self) -> Result<(), ServerError> {
        match &self.failure {
            None => Ok(()),
            Some(reason) => Err(ServerError::Generic { reason: reason.clone(), backtrace: Default::default() }),
        }
    }
}

/// CUDA C++ as C++ for the CPU, with a function `run`.
fn host_source(source: &str, kernel: &str) -> Result<String, String> {
    let mut out = String::from(include_str!("cuda.hpp"));
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

impl Server for Emulator {
    unsafe fn launch(
        &mut self,
        kernel: Box<dyn CubeKernel>,
        count: CubeCount,
        arguments: KernelArguments,
        _: StreamId,
        mode: LaunchMode,
    ) {
        if self.failure.is_none() && !mode.is_skipped() {
            self.failure = self.run(&*kernel, count, arguments).err();
        }
    }

    fn initialize_memory(&mut self, handle: ManagedMemoryHandle, size: u64, _: StreamId) -> Result<(), ServerError> {
        // Handles that no one holds any more give their memory back.
        self.memory.retain(|_, memory| memory.in_use());
        let binding = handle.binding();
        self.memory.insert(binding.id(), Memory::new(size as usize, binding.downgrade()));
        Ok(())
    }

    fn read(&mut self, reads: Vec<CopyDescriptor>, _: StreamId) -> DynFut<Result<Vec<Bytes>, ServerError>> {
        let bytes = self.state().and_then(|()| {
            let read = |read: &CopyDescriptor| match self.memory.get(&read.handle.memory.id()) {
                Some(memory) => Ok(Bytes::from_bytes_vec(memory.bytes(read.handle.range()).to_vec())),
                None => Err(ServerError::Generic { reason: "not allocated".into(), backtrace: Default::default() }),
            };
            reads.iter().map(read).collect()
        });
        Box::pin(async move { bytes })
    }

    fn write(&mut self, writes: Vec<(CopyDescriptor, Bytes)>, _: StreamId) {
        for (to, bytes) in writes {
            match self.memory.get_mut(&to.handle.memory.id()) {
                Some(memory) => memory.write(to.handle.range(), &bytes),
                None => self.failure = Some("a write to what was never allocated".into()),
            }
        }
    }

    fn sync(&mut self, _: Vec<BufferBinding>, _: StreamId) -> DynFut<Result<(), ServerError>> {
        let state = self.state();
        Box::pin(async move { state })
    }

    fn check(&mut self, _: Vec<BufferBinding>, _: StreamId) -> Result<(), ServerError> {
        self.state()
    }

    fn flush(&mut self, _: StreamId) -> Result<(), ServerError> {
        Ok(())
    }

    fn logger(&self) -> Arc<ServerLogger> {
        self.utilities.logger.clone()
    }

    fn utilities(&self) -> Arc<ServerUtilities> {
        self.utilities.clone()
    }

    fn memory_report(&mut self, _: StreamId) -> Option<StreamMemoryReport> {
        None
    }

    fn memory_cleanup(&mut self, _: StreamId) -> Result<(), ServerError> {
        Ok(())
    }

    fn start_profile(&mut self, _: StreamId) -> Result<ProfilingToken, ServerError> {
        Ok(self.timestamps.start())
    }

    fn end_profile(&mut self, _: StreamId, token: ProfilingToken) -> Result<ProfileDuration, ProfileError> {
        self.timestamps.stop(token)
    }

    fn allocation_mode(&mut self, _: MemoryAllocationMode, _: StreamId) {}
}

impl ServerCommunication for Emulator {}

impl ServerStorage for Emulator {
    type Storage = BytesStorage;

    fn get_resource(&mut self, _: BufferBinding, _: StreamId) -> Result<ManagedResource<BytesResource>, ServerError> {
        Err(ServerError::Generic { reason: "read it instead".into(), backtrace: Default::default() })
    }
}

impl DeviceService for Emulator {
    fn init(_: DeviceId) -> Self {
        unreachable!("an emulator registers its server before anyone asks for it")
    }

    fn utilities(&self) -> ServerUtilitiesHandle {
        self.utilities.clone()
    }
}
