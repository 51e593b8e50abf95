//! Finding text on disk.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// One text that stands for itself: a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// Where it comes from, for messages.
    pub name: String,
    /// The text.
    pub bytes: Vec<u8>,
}

/// Files above this are not source or prose that somebody wrote.
const MAX_FILE_BYTES: u64 = 256 << 20;

/// Reads a file, or all text files of a folder and the folders in it, in the order of their paths. Hidden files, build
/// outputs and files that are not UTF-8 text are left out of folders; a file that is named is taken as it is.
///
/// # Errors
/// If `path` does not exist, cannot be read, or holds no text.
pub fn read_text(path: &Path) -> Result<Vec<Document>> {
    let metadata = std::fs::metadata(path)
        .map_err(|error| Error::argument("text", format!("{} cannot be read: {error}", path.display())))?;
    let documents = if metadata.is_dir() {
        let mut files = Vec::new();
        collect(path, &|_| true, &mut files)?;
        read_all(files)?
    } else {
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        vec![Document { name: path.display().to_string(), bytes }]
    };
    if documents.iter().all(|document| document.bytes.is_empty()) {
        return Err(Error::argument("text", format!("{} holds no text", path.display())));
    }
    Ok(documents)
}

/// The sources and docs of the repository of this program that `start` lies in.
///
/// # Errors
/// If neither `start` nor a folder above it is that repository.
pub fn repository_text(start: &Path) -> Result<Vec<Document>> {
    let is_root =
        |folder: &&Path| folder.join("kernels/cpu/Cargo.toml").is_file() && folder.join("crates/cli").is_dir();
    let root = start.ancestors().find(is_root).ok_or_else(|| {
        Error::argument(
            "text",
            "not given, and the current directory is not inside thalweg's repository; name a file or a folder",
        )
    })?;
    let wanted = |path: &Path| {
        matches!(path.extension().and_then(|extension| extension.to_str()), Some("rs" | "md" | "toml" | "py" | "sh"))
    };
    let mut files = Vec::new();
    collect(root, &wanted, &mut files)?;
    read_all(files)
}

/// Files below `folder` in the order of their paths.
fn collect(folder: &Path, wanted: &dyn Fn(&Path) -> bool, files: &mut Vec<PathBuf>) -> Result<()> {
    let mut entries = std::fs::read_dir(folder)
        .and_then(|entries| entries.collect::<std::io::Result<Vec<_>>>())
        .map_err(Error::io(folder))?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let kind = entry.file_type().map_err(Error::io(folder))?;
        if name.starts_with('.') || (kind.is_dir() && matches!(&*name, "target" | "node_modules" | "runs")) {
            continue;
        }
        let path = entry.path();
        if kind.is_dir() {
            collect(&path, wanted, files)?;
        } else if kind.is_file() && wanted(&path) && entry.metadata().is_ok_and(|m| m.len() <= MAX_FILE_BYTES) {
            files.push(path);
        }
    }
    Ok(())
}

/// The files that are text.
fn read_all(files: Vec<PathBuf>) -> Result<Vec<Document>> {
    let mut documents = Vec::new();
    for path in files {
        let bytes = std::fs::read(&path).map_err(Error::io(&path))?;
        if !bytes.is_empty() && !bytes.contains(&0) && std::str::from_utf8(&bytes).is_ok() {
            documents.push(Document { name: path.display().to_string(), bytes });
        }
    }
    Ok(documents)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_gives_its_text_files_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, bytes).unwrap();
        };
        write("b.txt", b"bee");
        write("a/z.md", b"zed");
        write("picture.png", &[0x89, 0, 1]);
        write(".git/config", b"hidden");
        write("target/x.rs", b"built");
        write("empty", b"");
        let texts: Vec<_> = read_text(folder.path()).unwrap().into_iter().map(|document| document.bytes).collect();
        assert_eq!(texts, [b"zed", b"bee"]);
    }

    #[test]
    fn missing_and_empty_texts_name_the_argument() {
        let folder = tempfile::tempdir().unwrap();
        for path in [folder.path().join("none"), folder.path().to_owned()] {
            assert!(read_text(&path).unwrap_err().to_string().starts_with("text: "));
        }
        assert!(repository_text(folder.path()).unwrap_err().to_string().starts_with("text: not given"));
        assert!(!repository_text(Path::new(env!("CARGO_MANIFEST_DIR"))).unwrap().is_empty());
    }
}
