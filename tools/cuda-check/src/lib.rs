//! Compiles GPU kernels for CUDA, and runs them, on a machine that has no GPU.
//!
//! A `Recorder` is a CubeCL device that claims to be an A100 or an H100. What is launched on it is not run but taken
//! through CubeCL's CUDA C++, NVRTC and `ptxas`, as the real runtime and driver would, and recorded: whoever calls the
//! library's public functions with its client learns whether every kernel that they select compiles, and what it takes.
//!
//! What a kernel computes is seen on an `emulator`: the same device, whose kernels the machine's C++ compiler turns
//! into code for the CPU.

mod device;
mod emulator;
mod nvrtc;
mod ptxas;
mod recorder;
mod server;
mod transpile;

pub use device::Arch;
pub use emulator::emulator;
pub use ptxas::Resources;
pub use recorder::Recorder;

use std::env;
use std::fmt::Write;
use std::path::PathBuf;

/// Why nothing could be compiled.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum Error {
    #[error("the environment variable {variable} must name {what}; .ci/cuda sets it")]
    Variable { variable: &'static str, what: &'static str },
    #[error("cannot load NVRTC from {path}: {source}")]
    Library { path: PathBuf, source: libloading::Error },
    #[error("cannot run {path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
}

/// NVIDIA's compilers.
pub struct Toolchain {
    nvrtc: nvrtc::Nvrtc,
    includes: Vec<PathBuf>,
    ptxas: Option<PathBuf>,
}

impl Toolchain {
    /// The compilers that the environment names: `NVRTC_LIBRARY` the library, `CUDA_INCLUDE` the folders with its
    /// headers as in a `PATH`, and `PTXAS`, which may be absent, the assembler.
    ///
    /// # Errors
    /// [`Error::Variable`] for a missing one, [`Error::Library`] if the library cannot be loaded.
    pub fn from_env() -> Result<Self, Error> {
        let need = |variable, what| env::var_os(variable).ok_or(Error::Variable { variable, what });
        let library = need("NVRTC_LIBRARY", "libnvrtc.so")?;
        let includes = need("CUDA_INCLUDE", "the folders with CUDA's headers")?;
        Ok(Self {
            nvrtc: nvrtc::Nvrtc::load(library.as_ref())?,
            includes: env::split_paths(&includes).collect(),
            ptxas: env::var_os("PTXAS").map(PathBuf::from),
        })
    }

    /// Major and minor version of NVRTC.
    pub fn version(&self) -> (i32, i32) {
        self.nvrtc.version
    }

    /// The PTX of CUDA C++, with the options of `cubecl-cuda`.
    fn ptx(&self, arch: Arch, source: &str) -> Result<String, String> {
        let mut options = vec![format!("--gpu-architecture={}", arch.target()), "-lineinfo".into()];
        options.extend(self.includes.iter().map(|folder| format!("--include-path={}", folder.display())));
        self.nvrtc.compile(source, &options)
    }

    fn resources(&self, arch: Arch, ptx: &str) -> Result<Option<Resources>, String> {
        let Some(ptxas) = &self.ptxas else { return Ok(None) };
        ptxas::assemble(ptxas, arch, ptx).map_err(|e| e.to_string())?.map(Some)
    }
}

/// A kernel that was launched.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// What launched it first.
    pub case: String,
    /// Its entry point.
    pub name: String,
    /// For which device.
    pub arch: Arch,
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of shared memory that its launch asks for.
    pub dynamic_shared: usize,
    /// CUDA C++; empty if CubeCL did not get that far.
    pub source: String,
    /// Empty if it did not compile.
    pub ptx: String,
    /// What it takes, if there is an assembler to say so; else why it does not compile.
    pub outcome: Result<Option<Resources>, String>,
}

/// Bytes of stack that the assembler may use of its own accord.
const TRADED: u32 = 32;

impl Kernel {
    /// It compiles and needs to spill nothing. The assembler may trade some words on the stack for more blocks on a
    /// multiprocessor; that is its choice, which CubeCL gives no say in, and passes up to a bound.
    pub fn passes(&self) -> bool {
        let trades = |r: Resources| r.must_spill == 0 && r.stack <= TRADED;
        matches!(self.outcome, Ok(found) if found.is_none_or(|r| r.spilled() == 0 || trades(r)))
    }
}

/// One row per kernel.
pub fn table(kernels: &[Kernel]) -> String {
    let mut out = String::new();
    let width = |of: fn(&Kernel) -> &str, least| kernels.iter().map(|k| of(k).len()).max().unwrap_or(0).max(least);
    let (name, case) = (width(|k| &k.name, 6), width(|k| &k.case, 4));
    let heads = ["threads", "registers", "stack", "spilled", "shared", "blocks"];
    let _ = write!(out, "{:name$}  {:case$}  {:6}", "kernel", "case", "arch");
    heads.iter().for_each(|head| {
        let _ = write!(out, " {head:>9}");
    });
    out.push('\n');
    for k in kernels {
        let _ = write!(out, "{:name$}  {:case$}  {:6} {:>9}", k.name, k.case, k.arch.target(), k.threads);
        match &k.outcome {
            Err(_) => out.push_str("   does not compile"),
            Ok(None) => out.push_str("   compiles"),
            Ok(Some(r)) => {
                let shared = k.dynamic_shared + r.shared as usize;
                let blocks = k.arch.blocks(k.threads, r.registers, shared);
                let _ = write!(out, " {:>9} {:>9} {:>9} {shared:>9} {blocks:>9}", r.registers, r.stack, r.spilled());
            }
        }
        if k.outcome.is_ok() && !k.passes() {
            out.push_str("  spills");
        }
        out.push('\n');
    }
    out
}
