//! From a case to a row: verify, time, account.

#[cfg(feature = "gpu")]
use crate::Dtype;
use crate::heap::Meter;
use crate::workload::{Workload, build, verify, verify_start};
use crate::{Case, Ceilings, Effort, Error, Path, Row, Samples};
use burn::tensor::Device;
#[cfg(feature = "gpu")]
use std::sync::OnceLock;
use std::time::Duration;

/// Runs benchmarks on a number of threads, or on another device.
pub struct Runner {
    pool: rayon::ThreadPool,
    device: Device,
    ceilings: Ceilings,
    /// Of the GPU without Burn, with 16-bit and with f32 elements.
    #[cfg(feature = "gpu")]
    direct: [OnceLock<Ceilings>; 2],
    effort: Effort,
}

impl Runner {
    /// Starts the threads and measures their ceilings. `threads` of 0 are as many as there are processors (or as
    /// `RAYON_NUM_THREADS` says).
    ///
    /// # Errors
    /// If the threads cannot be started.
    pub fn new(threads: usize, effort: Effort) -> Result<Self, Error> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
        let ceilings = pool.install(|| Ceilings::measure(ceiling_time(effort)));
        Ok(Self {
            pool,
            device: Device::flex(),
            ceilings,
            #[cfg(feature = "gpu")]
            direct: Default::default(),
            effort,
        })
    }

    /// The same on another device, with ceilings measured there.
    ///
    /// # Errors
    /// If the device fails.
    pub fn on(self, device: Device, name: &str) -> Result<Self, Error> {
        let ceilings = Ceilings::measure_on(&device, name, ceiling_time(self.effort))?;
        Ok(Self { device, ceilings, ..self })
    }

    fn check(&self, case: &Case) -> Result<(), Error> {
        if case.path == Path::Native && self.device != Device::flex() {
            let reason = format!(
                "is `native`, which takes slices in the memory of the CPU; on {} there are burn, portable and gpu",
                self.ceilings.device
            );
            return Err(Error::argument("path", reason));
        }
        Ok(())
    }

    /// The measured ceilings of what runs a case; those of a GPU are measured when they are first asked for.
    ///
    /// # Errors
    /// If there is no GPU for a case that needs one.
    pub fn ceilings(&self, case: &Case) -> Result<&Ceilings, Error> {
        if case.path != Path::Gpu {
            return Ok(&self.ceilings);
        }
        #[cfg(feature = "gpu")]
        {
            let cell = &self.direct[usize::from(case.dtype == Dtype::F32)];
            if cell.get().is_none() {
                let measured = crate::gpu::ceilings(&crate::gpu::client()?, case.dtype)?;
                // Whoever was first measured the same.
                let _ = cell.set(measured);
            }
            Ok(cell.get().expect("set above"))
        }
        #[cfg(not(feature = "gpu"))]
        Err(Error::argument("path", "is `gpu`, which needs a build with a feature such as `cuda` or `wgpu`"))
    }

    /// Verifies, then times.
    ///
    /// # Errors
    /// [`Error::Wrong`] if the results are not the oracle's; nothing is timed then.
    pub fn run(&self, case: &Case) -> Result<Row, Error> {
        self.check(case)?;
        self.pool.install(|| {
            let device = &self.device;
            let error = verify(case, device)?;
            let meter = Meter::start();
            let mut workload = build(case, device)?;
            finish(workload.as_mut(), device)?;
            let taken = meter.map_or(0, Meter::peak);
            let peak = workload.device_bytes().unwrap_or(taken);
            let error = error.max(verify_start(case, workload.as_ref(), device)?);
            let samples = Samples::take(self.effort, workload.calls(), || finish(workload.as_mut(), device))?;
            let work = (workload.cost(), workload.tokens());
            Ok(Row::new(case, &samples, work, self.ceilings(case)?, error, peak))
        })
    }

    /// Verifies a case and makes it ready to be timed again and again.
    pub(crate) fn prepare(&self, case: &Case) -> Result<Prepared, Error> {
        self.check(case)?;
        self.pool.install(|| {
            let device = &self.device;
            let error = verify(case, device)?;
            let mut workload = build(case, device)?;
            finish(workload.as_mut(), device)?;
            let error = error.max(verify_start(case, workload.as_ref(), device)?);
            Ok(Prepared { case: case.clone(), workload, error })
        })
    }

    pub(crate) fn time(&self, prepared: &mut Prepared, effort: Effort) -> Result<(Row, Samples), Error> {
        let Prepared { case, workload, error } = prepared;
        let calls = workload.calls();
        let run = || finish(workload.as_mut(), &self.device);
        let samples = self.pool.install(|| Samples::take(effort, calls, run))?;
        let work = (workload.cost(), workload.tokens());
        Ok((Row::new(case, &samples, work, self.ceilings(case)?, *error, 0), samples))
    }
}

/// Seconds for each ceiling.
fn ceiling_time(effort: Effort) -> Duration {
    Duration::from_secs_f64((effort.seconds / 4.0).min(0.4))
}

/// A run, until the device is done with it.
fn finish(workload: &mut dyn Workload, device: &Device) -> Result<(), Error> {
    workload.run()?;
    Ok(device.sync()?)
}

/// A verified benchmark with its inputs in memory.
pub(crate) struct Prepared {
    case: Case,
    workload: Box<dyn Workload>,
    error: f64,
}
