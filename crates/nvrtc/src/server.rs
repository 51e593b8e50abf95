//! A CubeCL server whose launches compile and do not run.

use crate::device::{Arch, target_properties};
use crate::transpile::transpile;
use crate::{Kernel, Toolchain};
use cubecl::bytes::Bytes;
use cubecl::client::Client;
use cubecl::future::DynFut;
use cubecl::prelude::{CubeCount, CubeKernel, KernelId};
use cubecl::profile::ProfileDuration;
use cubecl_common::device::{DeviceId, DeviceService, ServerUtilitiesHandle, ServiceId};
use cubecl_cpp::shared::CompilationOptions;
use cubecl_environment::stream::StreamId;
use cubecl_server::allocator::PitchedMemoryLayoutPolicy;
use cubecl_server::dry_run::LaunchMode;
use cubecl_server::logging::ServerLogger;
use cubecl_server::memory_management::{ManagedMemoryHandle, MemoryAllocationMode, StreamMemoryReport};
use cubecl_server::server::{
    BufferBinding, CopyDescriptor, KernelArguments, ProfileError, ProfilingToken, Server, ServerCommunication,
    ServerError, ServerStorage, ServerUtilities,
};
use cubecl_server::storage::{BytesResource, BytesStorage, ManagedResource};
use cubecl_server::timestamp_profiler::TimestampProfiler;
use std::collections::HashSet;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A device to call kernels on, and what was compiled for it.
pub struct Recorder {
    /// To be given to what launches the kernels. Buffers have a size but no memory: reading gives zeros.
    pub client: Client,
    /// Cases whose name does not contain this are left out.
    pub only: String,
    shared: Arc<Mutex<Shared>>,
}

/// What the server, on its own thread, and the recorder share.
#[derive(Default)]
struct Shared {
    case: String,
    kernels: Vec<Kernel>,
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Recorder {
    /// A device of `arch`.
    pub fn new(arch: Arch, toolchain: Arc<Toolchain>) -> Self {
        static DEVICES: AtomicU16 = AtomicU16::new(0);
        let device = DeviceId::new(0, DEVICES.fetch_add(1, Ordering::Relaxed));
        let shared = Arc::new(Mutex::new(Shared::default()));
        let server = CompileServer::new(device, arch, toolchain, shared.clone());
        Self { client: Client::init(device, server), only: String::new(), shared }
    }

    /// Runs what launches kernels; those not seen before are listed under the name of this first case that needs them.
    pub fn case(&self, name: &str, launches: impl FnOnce(&Client)) {
        if !name.contains(&self.only) {
            return;
        }
        lock(&self.shared).case = name.into();
        launches(&self.client);
        // A launch only queues.
        cubecl::future::block_on(self.client.sync()).expect("no work of this server fails");
    }

    /// All kernels so far, in the order of their first launch.
    pub fn kernels(&self) -> Vec<Kernel> {
        lock(&self.shared).kernels.clone()
    }
}

struct CompileServer {
    arch: Arch,
    options: CompilationOptions,
    toolchain: Arc<Toolchain>,
    utilities: Arc<ServerUtilities>,
    seen: HashSet<KernelId>,
    shared: Arc<Mutex<Shared>>,
    timestamps: TimestampProfiler,
}

impl std::fmt::Debug for CompileServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CompileServer").field("arch", &self.arch).finish_non_exhaustive()
    }
}

impl CompileServer {
    fn new(device: DeviceId, arch: Arch, toolchain: Arc<Toolchain>, shared: Arc<Mutex<Shared>>) -> Self {
        let properties = arch.properties();
        let policy = PitchedMemoryLayoutPolicy::new(properties.memory.alignment as usize);
        let (utilities, _) = ServerUtilities::init(
            ServiceId::of::<Self>(device),
            "cuda",
            properties,
            target_properties(),
            Arc::new(ServerLogger::default()),
            policy,
        );
        Self {
            arch,
            options: arch.options(toolchain.version()),
            toolchain,
            utilities: Arc::new(utilities),
            seen: HashSet::new(),
            shared,
            timestamps: TimestampProfiler::default(),
        }
    }
}

impl Server for CompileServer {
    unsafe fn launch(
        &mut self,
        kernel: Box<dyn CubeKernel>,
        _: CubeCount,
        _: KernelArguments,
        _: StreamId,
        _: LaunchMode,
    ) {
        let id = kernel.id();
        if !self.seen.insert(id.clone()) {
            return;
        }
        let mut record = Kernel {
            case: lock(&self.shared).case.clone(),
            name: kernel.name().split('<').next().unwrap_or_default().into(),
            arch: self.arch,
            threads: id.cube_dim.num_elems(),
            dynamic_shared: 0,
            source: String::new(),
            ptx: String::new(),
            outcome: Err(String::new()),
        };
        record.outcome = transpile(&self.utilities.properties, &self.options, &*kernel).and_then(|compiled| {
            // Without the hash that tells instances apart.
            record.name =
                compiled.entrypoint_name.rsplit_once("_").map_or("", |(name, _)| name).trim_end_matches("_").into();
            record.source = compiled.source;
            record.dynamic_shared = compiled.repr.map_or(0, |repr| repr.shared_memory_size);
            let limit = self.arch.shared_memory();
            if record.dynamic_shared > limit {
                return Err(format!("{} bytes of shared memory, the device has {limit}", record.dynamic_shared));
            }
            record.ptx = self.toolchain.ptx(self.arch, &record.source)?;
            self.toolchain.resources(self.arch, &record.ptx)
        });
        lock(&self.shared).kernels.push(record);
    }

    fn initialize_memory(&mut self, _: ManagedMemoryHandle, _: u64, _: StreamId) -> Result<(), ServerError> {
        Ok(())
    }

    fn read(&mut self, reads: Vec<CopyDescriptor>, _: StreamId) -> DynFut<Result<Vec<Bytes>, ServerError>> {
        let zeros = |read: &CopyDescriptor| Bytes::from_bytes_vec(vec![0; read.handle.size_in_used() as usize]);
        let bytes = reads.iter().map(zeros).collect();
        Box::pin(async move { Ok(bytes) })
    }

    fn write(&mut self, _: Vec<(CopyDescriptor, Bytes)>, _: StreamId) {}

    fn sync(&mut self, _: Vec<BufferBinding>, _: StreamId) -> DynFut<Result<(), ServerError>> {
        Box::pin(async { Ok(()) })
    }

    fn check(&mut self, _: Vec<BufferBinding>, _: StreamId) -> Result<(), ServerError> {
        Ok(())
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

impl ServerCommunication for CompileServer {}

impl ServerStorage for CompileServer {
    type Storage = BytesStorage;

    fn get_resource(&mut self, _: BufferBinding, _: StreamId) -> Result<ManagedResource<BytesResource>, ServerError> {
        Err(ServerError::Generic { reason: "this device has no memory".into(), backtrace: Default::default() })
    }
}

impl DeviceService for CompileServer {
    fn init(_: DeviceId) -> Self {
        unreachable!("a recorder registers its server before anyone asks for it")
    }

    fn utilities(&self) -> ServerUtilitiesHandle {
        self.utilities.clone()
    }
}
