//! Compiles every kernel that the library can select; exits with 1 if one does not compile or is out of registers.
//!
//! With a folder as its argument it leaves each kernel's CUDA C++ and PTX there.

mod cases;

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use thalweg_nvrtc::{Arch, Kernel, Recorder, Toolchain, table};

fn main() -> ExitCode {
    let toolchain = match Toolchain::from_env() {
        Ok(toolchain) => Arc::new(toolchain),
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    eprintln!("compiling for {}, which takes some minutes", Arch::ALL.map(Arch::target).join(" and "));
    let kernels: Vec<Kernel> = std::thread::scope(|scope| {
        let compile = |arch| {
            let recorder = Recorder::new(arch, toolchain.clone());
            cases::all(&recorder);
            recorder.kernels()
        };
        let devices = Arch::ALL.map(|arch| scope.spawn(move || compile(arch)));
        devices.into_iter().flat_map(|device| device.join().expect("cases do not panic")).collect()
    });
    if let Some(folder) = std::env::args_os().nth(1)
        && let Err(error) = keep(folder.as_ref(), &kernels)
    {
        eprintln!("{}: {error}", folder.display());
        return ExitCode::FAILURE;
    }
    print!("{}", table(&kernels));
    for kernel in &kernels {
        if let Err(why) = &kernel.outcome {
            eprintln!("\n{} for {}: {}\n{why}", kernel.name, kernel.arch.target(), kernel.case);
        }
    }
    let failed = kernels.iter().filter(|kernel| !kernel.passes()).count();
    println!("{} kernels, {failed} that do not compile or run out of registers", kernels.len());
    if failed == 0 && !kernels.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn keep(folder: &Path, kernels: &[Kernel]) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    for (i, kernel) in kernels.iter().enumerate() {
        let file = folder.join(format!("{i:03}-{}-{}", kernel.name, kernel.arch.target()));
        std::fs::write(file.with_extension("cu"), &kernel.source)?;
        std::fs::write(file.with_extension("ptx"), &kernel.ptx)?;
    }
    Ok(())
}
