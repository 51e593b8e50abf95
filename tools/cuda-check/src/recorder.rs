//! A device whose launches compile and do not run.

use crate::device::Arch;
use crate::server::{HostServer, Work, lock};
use crate::transpile::transpile;
use crate::{Kernel, Toolchain};
use cubecl::bytes::Bytes;
use cubecl::ir::DeviceProperties;
use cubecl::prelude::{CubeCount, CubeKernel, KernelId};
use cubecl_cpp::shared::CompilationOptions;
use cubecl_server::memory_management::ManagedMemoryHandle;
use cubecl_server::server::{CopyDescriptor, KernelArguments};
use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use thalweg_gpu::Client;

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

impl Recorder {
    /// A device of `arch`.
    ///
    /// With `representatives` only the first kernel of each name and storage type is compiled.
    pub fn new(arch: Arch, toolchain: Arc<Toolchain>, representatives: bool) -> Self {
        let shared = Arc::new(Mutex::new(Shared::default()));
        let options = arch.options(toolchain.version());
        let seen = Seen { kernels: HashSet::new(), representatives: representatives.then(HashSet::new) };
        let work = Compile { arch, options, toolchain, seen, shared: shared.clone() };
        Self { client: HostServer::client(arch.properties(), work).into(), only: String::new(), shared }
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

    /// The same device with other options for what is launched from now on.
    pub fn with_tf32(mut self, allowed: bool) -> Self {
        self.client = self.client.with_tf32(allowed);
        self
    }

    /// All kernels so far, in the order of their first launch.
    pub fn kernels(&self) -> Vec<Kernel> {
        lock(&self.shared).kernels.clone()
    }
}

struct Compile {
    arch: Arch,
    options: CompilationOptions,
    toolchain: Arc<Toolchain>,
    seen: Seen,
    shared: Arc<Mutex<Shared>>,
}

/// What was compiled.
struct Seen {
    kernels: HashSet<KernelId>,
    /// Names and storage types, if one of each is enough.
    representatives: Option<HashSet<(String, Option<&'static str>)>>,
}

impl Seen {
    /// Whether a kernel that is launched by a case is new.
    fn insert(&mut self, id: &KernelId, name: &str, case: &str) -> bool {
        if !self.kernels.insert(id.clone()) {
            return false;
        }
        // Cases name the storage type as `Debug` prints it.
        let storage = ["Bf16", "F16", "F32"].into_iter().find(|storage| case.split(' ').any(|word| word == *storage));
        self.representatives.as_mut().is_none_or(|known| known.insert((name.into(), storage)))
    }
}

impl Work for Compile {
    fn launch(&mut self, properties: &DeviceProperties, kernel: &dyn CubeKernel, _: CubeCount, _: KernelArguments) {
        let id = kernel.id();
        let case = lock(&self.shared).case.clone();
        let name = kernel.name().split('<').next().unwrap_or_default();
        if !self.seen.insert(&id, name, &case) {
            return;
        }
        let mut record = Kernel {
            case,
            name: name.into(),
            arch: self.arch,
            threads: id.cube_dim.num_elems(),
            dynamic_shared: 0,
            source: String::new(),
            ptx: String::new(),
            outcome: Err(String::new()),
        };
        record.outcome = transpile(properties, &self.options, kernel).and_then(|compiled| {
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

    fn allocate(&mut self, _: ManagedMemoryHandle, _: usize) {}

    fn read(&self, from: &CopyDescriptor) -> Result<Bytes, String> {
        Ok(Bytes::from_bytes_vec(vec![0; from.handle.size_in_used() as usize]))
    }

    fn write(&mut self, _: &CopyDescriptor, _: &[u8]) {}

    fn state(&self) -> Result<(), String> {
        Ok(())
    }
}
