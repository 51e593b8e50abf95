//! A CubeCL server for devices that are not there.

use crate::device::target_properties;
use cubecl::bytes::Bytes;
use cubecl::client::Client;
use cubecl::future::DynFut;
use cubecl::ir::DeviceProperties;
use cubecl::prelude::{CubeCount, CubeKernel};
use cubecl::profile::ProfileDuration;
use cubecl_common::device::{DeviceId, DeviceService, ServerUtilitiesHandle, ServiceId};
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
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What is done where a device would work.
pub(crate) trait Work: Send + 'static {
    /// A launch; what fails is said by [`Work::state`].
    fn launch(
        &mut self,
        properties: &DeviceProperties,
        kernel: &dyn CubeKernel,
        count: CubeCount,
        arguments: KernelArguments,
    );
    fn allocate(&mut self, handle: ManagedMemoryHandle, size: usize);
    fn read(&self, from: &CopyDescriptor) -> Result<Bytes, String>;
    fn write(&mut self, to: &CopyDescriptor, bytes: &[u8]);
    /// What went wrong so far.
    fn state(&self) -> Result<(), String>;
}

/// A lock that outlives a test which panicked while it held it.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) struct HostServer<W> {
    work: W,
    utilities: Arc<ServerUtilities>,
    timestamps: TimestampProfiler,
}

impl<W: Work> HostServer<W> {
    /// A client of a new device with these properties.
    pub fn client(properties: DeviceProperties, work: W) -> Client {
        static DEVICES: AtomicU16 = AtomicU16::new(0);
        let device = DeviceId::new(0, DEVICES.fetch_add(1, Ordering::Relaxed));
        let policy = PitchedMemoryLayoutPolicy::new(properties.memory.alignment as usize);
        let (utilities, _) = ServerUtilities::init(
            ServiceId::of::<Self>(device),
            "cuda",
            properties,
            target_properties(),
            Arc::new(ServerLogger::default()),
            policy,
        );
        Client::init(device, Self { work, utilities: Arc::new(utilities), timestamps: TimestampProfiler::default() })
    }

    fn state(&self) -> Result<(), ServerError> {
        self.work.state().map_err(error)
    }
}

fn error(reason: String) -> ServerError {
    ServerError::Generic { reason, backtrace: Default::default() }
}

impl<W> std::fmt::Debug for HostServer<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostServer").field("device", &self.utilities.properties.identity).finish_non_exhaustive()
    }
}

impl<W: Work> Server for HostServer<W> {
    unsafe fn launch(
        &mut self,
        kernel: Box<dyn CubeKernel>,
        count: CubeCount,
        arguments: KernelArguments,
        _: StreamId,
        mode: LaunchMode,
    ) {
        if !mode.is_skipped() {
            self.work.launch(&self.utilities.properties, &*kernel, count, arguments);
        }
    }

    fn initialize_memory(&mut self, handle: ManagedMemoryHandle, size: u64, _: StreamId) -> Result<(), ServerError> {
        self.work.allocate(handle, size as usize);
        Ok(())
    }

    fn read(&mut self, reads: Vec<CopyDescriptor>, _: StreamId) -> DynFut<Result<Vec<Bytes>, ServerError>> {
        let all = || reads.iter().map(|from| self.work.read(from).map_err(error)).collect();
        let bytes = self.state().and_then(|()| all());
        Box::pin(async move { bytes })
    }

    fn write(&mut self, writes: Vec<(CopyDescriptor, Bytes)>, _: StreamId) {
        writes.iter().for_each(|(to, bytes)| self.work.write(to, bytes));
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

impl<W: Work> ServerCommunication for HostServer<W> {}

impl<W: Work> ServerStorage for HostServer<W> {
    type Storage = BytesStorage;

    fn get_resource(&mut self, _: BufferBinding, _: StreamId) -> Result<ManagedResource<BytesResource>, ServerError> {
        Err(error("memory of this device is only read and written".into()))
    }
}

impl<W: Work> DeviceService for HostServer<W> {
    fn init(_: DeviceId) -> Self {
        unreachable!("a client registers its server before anyone asks for it")
    }

    fn utilities(&self) -> ServerUtilitiesHandle {
        self.utilities.clone()
    }
}
