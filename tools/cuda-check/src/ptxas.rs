//! PTX to machine code, for what the assembler says of it: registers, spills, shared memory.

use crate::{Arch, Error};
use std::io::Write;
use std::path::Path;
use std::process::Command;

/// What one thread, and for static shared memory one block, takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Resources {
    /// 32-bit registers.
    pub registers: u32,
    /// Bytes that are stored to local memory because registers ran out.
    pub spill_stores: u32,
    /// Bytes that are loaded from there.
    pub spill_loads: u32,
    /// Bytes of local memory, spills included: arrays that are indexed at run time are there too.
    pub stack: u32,
    /// Bytes of shared memory that the kernel declares statically.
    pub shared: u32,
    /// [`Resources::spilled`] if one block on a multiprocessor were enough: what needs to be spilled.
    pub must_spill: u32,
}

impl Resources {
    /// Bytes that go to local memory and come back because of registers.
    pub fn spilled(&self) -> u32 {
        self.spill_stores + self.spill_loads
    }
}

/// Assembles a kernel; the error is the assembler's message. By itself the assembler takes so few registers that several
/// blocks fit a multiprocessor; where it spills for that, it is asked again with one.
pub(crate) fn assemble(ptxas: &Path, arch: Arch, ptx: &str) -> Result<Result<Resources, String>, Error> {
    let mut found = once(ptxas, arch, ptx)?;
    if let Ok(resources) = &mut found
        && resources.spilled() > 0
    {
        let alone = once(ptxas, arch, &for_one_block(ptx))?;
        resources.must_spill = alone.map_or(resources.spilled(), |alone| alone.spilled());
    }
    Ok(found)
}

/// The same kernel, with a promise that more than one block on a multiprocessor is not asked for.
fn for_one_block(ptx: &str) -> String {
    let lines = ptx.lines().map(|line| match line.starts_with(".maxntid") {
        true => format!("{line}\n.minnctapersm 1\n"),
        false => format!("{line}\n"),
    });
    lines.collect()
}

fn once(ptxas: &Path, arch: Arch, ptx: &str) -> Result<Result<Resources, String>, Error> {
    let io = |source| Error::Io { path: ptxas.to_owned(), source };
    let mut file = tempfile::Builder::new().suffix(".ptx").tempfile().map_err(io)?;
    file.write_all(ptx.as_bytes()).map_err(io)?;
    let output = Command::new(ptxas)
        .args(["-v", "-arch", arch.target(), "-o", "/dev/null"])
        .arg(file.path())
        .output()
        .map_err(io)?;
    let log = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    Ok(if output.status.success() { parse(&log).ok_or(log) } else { Err(log) })
}

/// Reads `ptxas -v`: a line of the stack and spills, and one of the registers and shared memory.
fn parse(log: &str) -> Option<Resources> {
    let before = |line: &str, what: &str| -> Option<u32> {
        let words = line[..line.find(what)?].trim_end();
        words.rsplit(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
    };
    let spills = log.lines().find(|line| line.contains("bytes spill stores"))?;
    let used = log.lines().find(|line| line.contains(" registers"))?;
    Some(Resources {
        registers: before(used, " registers")?,
        spill_stores: before(spills, " bytes spill stores")?,
        spill_loads: before(spills, " bytes spill loads")?,
        stack: before(spills, " bytes stack frame")?,
        shared: before(used, " bytes smem").unwrap_or(0),
        must_spill: 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn promises_follow_the_number_of_threads() {
        let ptx = ".visible .entry scores(\n)\n.maxntid 256, 1, 1\n{\n}\n";
        assert_eq!(for_one_block(ptx), ".visible .entry scores(\n)\n.maxntid 256, 1, 1\n.minnctapersm 1\n{\n}\n");
    }

    #[test]
    fn reads_what_the_assembler_prints() {
        let log = "ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'scores' for 'sm_90a'
ptxas info    : Function properties for scores
    24 bytes stack frame, 16 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 24 bytes cumulative stack size, 49152 bytes smem
ptxas info    : Compile time = 51.203 ms
";
        let expected =
            Resources { registers: 255, spill_stores: 16, spill_loads: 12, stack: 24, shared: 49152, must_spill: 0 };
        assert_eq!(parse(log), Some(expected));
        assert_eq!(expected.spilled(), 28);
        assert_eq!(parse("ptxas fatal   : Unresolved extern function"), None);
    }
}
