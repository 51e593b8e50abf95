//! The machine: what it is, and what it can do at the most.

use crate::Error;
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::process::Command;
use std::time::{Duration, Instant};
use thalweg_kernels::ceiling;
use thalweg_kernels::cost::Cost;

/// Where and of what a report is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Name of the processor.
    pub cpu: String,
    /// Architecture and system.
    pub target: String,
    /// Processors that this process may use.
    pub processors: usize,
    /// Vector features of the processor.
    pub features: Vec<String>,
    /// The vector unit that the kernels use; empty in older reports.
    #[serde(default)]
    pub vector_unit: String,
    /// Version of thalweg.
    pub version: String,
    /// Commit of the checkout that it was built from, with a `+` if it has changes; empty outside of one.
    pub commit: String,
}

impl Machine {
    /// This one.
    pub fn here() -> Self {
        Self {
            cpu: cpu_name(),
            target: format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS),
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            features: features(),
            vector_unit: thalweg_kernels::vector_unit().into(),
            version: env!("CARGO_PKG_VERSION").into(),
            commit: commit().unwrap_or_default(),
        }
    }
}

fn cpu_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = info.lines().find(|line| line.split(':').next().is_some_and(|key| key.trim() == name))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    // Virtual machines often hide the name; family and model still say which generation it is.
    match (field("model name"), field("cpu family"), field("model")) {
        (Some(name), Some(family), Some(model)) => format!("{name} (family {family}, model {model})"),
        (Some(name), ..) => name,
        _ => std::env::consts::ARCH.into(),
    }
}

fn features() -> Vec<String> {
    #[cfg(target_arch = "x86_64")]
    let found = [
        ("avx2", std::arch::is_x86_feature_detected!("avx2")),
        ("fma", std::arch::is_x86_feature_detected!("fma")),
        ("avx512f", std::arch::is_x86_feature_detected!("avx512f")),
        ("avx512bf16", std::arch::is_x86_feature_detected!("avx512bf16")),
    ];
    #[cfg(target_arch = "aarch64")]
    let found = [("neon", true)];
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let found: [(&str, bool); 0] = [];
    found.into_iter().filter(|(_, has)| *has).map(|(name, _)| name.to_owned()).collect()
}

fn commit() -> Option<String> {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(["-C", env!("CARGO_MANIFEST_DIR")]).args(arguments).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let commit = git(&["rev-parse", "--short", "HEAD"])?;
    let changed = git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|changes| !changes.is_empty());
    Some(if changed { commit + "+" } else { commit })
}

/// Measured ceilings of a device, on a CPU for one number of threads.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ceilings {
    /// Name of the device: as in `--device`, or of a GPU without Burn its own.
    #[serde(default = "cpu")]
    pub device: String,
    /// Threads; 0 of a GPU without Burn.
    pub threads: usize,
    /// Matrix products, GFLOP/s: of f32, on a CPU in cache; on a GPU without Burn of the element type.
    pub product: f64,
    /// Copies by the bytes that they touch: GB/s, read and write counted.
    pub copies: Vec<(usize, f64)>,
}

/// Bytes that a copy touches: within the second-level cache of a core, within the last level, beyond most of them, in
/// memory.
const COPIES: [usize; 4] = [512 << 10, 8 << 20, 64 << 20, 512 << 20];

/// The device of reports that name none.
pub(crate) fn cpu() -> String {
    "cpu".into()
}

impl fmt::Display for Ceilings {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}", self.device)?;
        if self.threads > 0 {
            write!(f, ", {} threads", self.threads)?;
        }
        write!(f, ": products {:.1} GFLOP/s; copies", self.product)?;
        for (i, (bytes, rate)) in self.copies.iter().enumerate() {
            write!(f, "{} {rate:.1} GB/s over {} KiB", if i > 0 { "," } else { "" }, bytes >> 10)?;
        }
        Ok(())
    }
}

impl Ceilings {
    /// Measures on all threads of the current pool; `time` for each number.
    pub fn measure(time: Duration) -> Self {
        Self {
            device: cpu(),
            threads: rayon::current_num_threads(),
            product: ceiling::matrix_product(time),
            copies: COPIES.map(|bytes| (bytes, ceiling::copy(bytes, time))).to_vec(),
        }
    }

    /// Measures what Burn's own products and copies reach on a device.
    ///
    /// # Errors
    /// If the device fails.
    pub fn measure_on(device: &Device, name: &str, time: Duration) -> Result<Self, Error> {
        let square = |side: usize| Tensor::<2>::ones([side, side], device);
        // The best of the sizes that a device finishes in a moment: small products cannot occupy a large one.
        let mut product = 0.0f64;
        for side in [1024, 2048, 4096, 8192] {
            let x = square(side);
            let product_of = || x.clone().matmul(x.clone()).flatten(0, 1);
            let Some(seconds) = fastest(device, time, side as f32, product_of)? else { break };
            product = product.max(2.0 * (side as f64).powi(3) / seconds / 1e9);
            if seconds > 0.02 {
                break;
            }
        }
        let mut copies = Vec::new();
        for bytes in COPIES {
            let x = Tensor::<1>::ones([bytes / 8], device);
            let Some(seconds) = fastest(device, time, 2.0, || x.clone().add_scalar(1.0))? else { break };
            copies.push((bytes, bytes as f64 / seconds / 1e9));
        }
        if product == 0.0 || copies.is_empty() {
            return Err(Error::argument("device", format!("{name} computes no products of 1024 x 1024 or no copies")));
        }
        Ok(Self { device: name.into(), threads: rayon::current_num_threads(), product, copies })
    }

    /// GB/s of a copy that touches about as many bytes, from `COPIES`: a small working set stays in cache from one
    /// repetition to the next, and memory is then no ceiling.
    pub fn copy(&self, bytes: u64) -> f64 {
        let distance = |size: usize| (size as f64 / bytes.max(1) as f64).ln().abs();
        let nearest = self.copies.iter().min_by(|x, y| distance(x.0).total_cmp(&distance(y.0)));
        nearest.map_or(0.0, |copy| copy.1)
    }

    /// Seconds that `cost` takes at the least.
    pub fn floor(&self, cost: Cost) -> f64 {
        cost.floor(self.product, self.copy(cost.bytes))
    }

    /// Whether bytes bind `cost`, not products.
    pub fn copy_binds(&self, cost: Cost) -> bool {
        cost.bytes as f64 / self.copy(cost.bytes) > cost.flops as f64 / self.product
    }
}

/// Seconds of the fastest of the runs that fit in `time`, after one that is not counted. None if that one's last number is not
/// `expected`: a device that has no room for a tensor says so late, if at all, and takes no time over it.
fn fastest(device: &Device, time: Duration, expected: f32, run: impl Fn() -> Tensor<1>) -> Result<Option<f64>, Error> {
    let timed = || {
        let start = Instant::now();
        drop(run());
        device.sync().map(|()| start.elapsed().as_secs_f64())
    };
    let x = run();
    let last = x.dims()[0] - 1;
    if !x.narrow(0, last, 1).try_into_scalar::<f32>().is_ok_and(|found| found == expected) {
        return Ok(None);
    }
    let (all, mut best) = (Instant::now(), timed()?);
    while all.elapsed() < time {
        best = best.min(timed()?);
    }
    Ok(Some(best))
}
