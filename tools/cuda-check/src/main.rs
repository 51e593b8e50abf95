//! Compiles every kernel that the library can select; exits with 1 if one does not compile or spills registers.
//!
//! usage: thalweg-cuda-check [--representatives] [--only CASE] [--keep FOLDER]
//!
//! `--representatives` compiles one kernel of each name and storage type, for an H100; `--only` takes the cases whose name contains it; `--keep` leaves each kernel's CUDA C++ and PTX in a folder.

mod cases;

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use thalweg_cuda_check::{Arch, Kernel, Recorder, Toolchain, table};

fn main() -> ExitCode {
    let (mut only, mut folder, mut representatives) = (String::new(), None, false);
    let mut arguments = std::env::args().skip(1);
    while let Some(option) = arguments.next() {
        if option == "--representatives" {
            representatives = true;
            continue;
        }
        match (option.as_str(), arguments.next()) {
            ("--only", Some(case)) => only = case,
            ("--keep", Some(path)) => folder = Some(path),
            _ => {
                eprintln!("usage: thalweg-cuda-check [--representatives] [--only CASE] [--keep FOLDER]");
                return ExitCode::from(2);
            }
        }
    }
    let toolchain = match Toolchain::from_env() {
        Ok(toolchain) => Arc::new(toolchain),
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    let devices = if representatives { &[Arch::Sm90][..] } else { &Arch::ALL };
    let targets: Vec<_> = devices.iter().map(|arch| arch.target()).collect();
    eprintln!("compiling for {}, which takes some minutes", targets.join(" and "));
    let recorder = |&arch: &Arch| {
        let mut recorder = Recorder::new(arch, toolchain.clone(), representatives);
        recorder.only.clone_from(&only);
        recorder
    };
    let recorders: Vec<_> = devices.iter().map(recorder).collect();
    let compile = |recorders: &[Recorder], cases: fn(&Recorder)| {
        std::thread::scope(|scope| recorders.iter().for_each(|device| drop(scope.spawn(|| cases(device)))));
    };
    compile(&recorders, cases::all);
    let recorders: Vec<_> = recorders.into_iter().map(|device| device.with_tf32(true)).collect();
    compile(&recorders, cases::tf32);
    let kernels: Vec<Kernel> = recorders.iter().flat_map(Recorder::kernels).collect();
    if let Some(folder) = folder
        && let Err(error) = keep(folder.as_ref(), &kernels)
    {
        eprintln!("{folder}: {error}");
        return ExitCode::FAILURE;
    }
    print!("{}", table(&kernels));
    for kernel in &kernels {
        if let Err(why) = &kernel.outcome {
            eprintln!("\n{} for {}: {}\n{why}", kernel.name, kernel.arch.target(), kernel.case);
        }
    }
    let failed = kernels.iter().filter(|kernel| !kernel.passes()).count();
    println!("{} kernels, {failed} that do not compile or spill", kernels.len());
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
