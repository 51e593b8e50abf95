//! Files and folders that are on disk whole or not at all, in a folder that one run at a time writes into.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Leads the names of what is being written or removed.
const TEMPORARY: &str = ".writing-";
const LOCK: &str = ".lock";

/// Writes a file and waits until it is on disk.
pub(crate) fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || {
        let mut file = File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(Error::io(path))
}

/// Replaces a file as a whole.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = temporary(path);
    write_synced(&temporary, bytes)
        .and_then(|()| fs::rename(&temporary, path).map_err(Error::io(path)))
        // What was written of it would keep a full disk full.
        .inspect_err(|_| drop(fs::remove_file(&temporary)))?;
    sync_folder(path.parent());
    Ok(())
}

/// Makes the folder `target` with `files` in it, each written by `write` ([`write_synced`]).
pub(crate) fn write_folder(
    target: &Path,
    files: &[(&str, Vec<u8>)],
    write: impl Fn(&Path, &[u8]) -> Result<()>,
) -> Result<()> {
    let temporary = temporary(target);
    remove(&temporary)?; // left by a process that was killed
    let make = || {
        fs::create_dir(&temporary).map_err(Error::io(&temporary))?;
        files.iter().try_for_each(|(name, bytes)| write(&temporary.join(name), bytes))?;
        sync_folder(Some(&temporary));
        fs::rename(&temporary, target).map_err(Error::io(target))
    };
    make().inspect_err(|_| drop(remove(&temporary)))?;
    sync_folder(target.parent());
    Ok(())
}

/// Removes a folder; if the process is killed meanwhile, no part of it is left under its name.
pub(crate) fn remove_folder(folder: &Path) -> Result<()> {
    let temporary = temporary(folder);
    remove(&temporary)?;
    fs::rename(folder, &temporary).map_err(Error::io(folder))?;
    remove(&temporary)
}

/// Removes what killed processes have left in `folder` of writing or removing the names that are `ours`.
pub(crate) fn clean(folder: &Path, ours: impl Fn(&str) -> bool) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(Error::io(folder))?.flatten() {
        if entry.file_name().to_str().and_then(|name| name.strip_prefix(TEMPORARY)).is_some_and(&ours) {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

fn temporary(path: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(TEMPORARY);
    name.push(path.file_name().unwrap_or_default());
    path.with_file_name(name)
}

/// Removes a file or a folder, if it is there.
fn remove(path: &Path) -> Result<()> {
    let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    removed
        .or_else(|error| if error.kind() == ErrorKind::NotFound { Ok(()) } else { Err(error) })
        .map_err(Error::io(path))
}

/// Puts the names in a folder on disk, where the system can.
fn sync_folder(folder: Option<&Path>) {
    if let Some(folder) = folder.and_then(|folder| File::open(folder).ok()) {
        let _ = folder.sync_all();
    }
}

/// The right to write into a run's folder. The system takes it back when the process ends, however that happens, so a run
/// that was killed is in nobody's way.
#[derive(Debug)]
pub(crate) struct Lock {
    folder: PathBuf,
    _file: File,
}

impl Lock {
    /// Takes the right to write into `folder`, which must exist.
    ///
    /// # Errors
    /// [`Error::Locked`] if another run has it, in this process or another.
    pub(crate) fn take(folder: &Path) -> Result<Self> {
        let path = folder.join(LOCK);
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path).map_err(Error::io(&path))?;
        let folder = folder.to_owned();
        match file.try_lock() {
            Ok(()) => Ok(Self { folder, _file: file }),
            Err(TryLockError::WouldBlock) => Err(Error::Locked { path: folder }),
            // Some network file systems have no locks.
            Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Unsupported => {
                Ok(Self { folder, _file: file })
            }
            Err(TryLockError::Error(error)) => Err(Error::io(&path)(error)),
        }
    }

    /// The folder.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Stands for a disk that has no room for the second file.
    fn full_disk(path: &Path, bytes: &[u8]) -> Result<()> {
        if path.ends_with("second") {
            write_synced(path, &bytes[..bytes.len() / 2])?;
            return Err(Error::io(path)(ErrorKind::StorageFull.into()));
        }
        write_synced(path, bytes)
    }

    #[test]
    fn a_folder_that_cannot_be_written_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("step-1");
        let files = [("first", b"1111".to_vec()), ("second", b"2222".to_vec())];
        let error = write_folder(&target, &files, full_disk).unwrap_err();
        assert!(matches!(error, Error::Io { .. }) && error.to_string().contains("second"), "{error}");
        assert!(names(folder.path()).is_empty(), "{:?}", names(folder.path()));
        write_folder(&target, &files, write_synced).unwrap();
        assert_eq!(names(folder.path()), ["step-1"]);
        assert_eq!(fs::read(target.join("second")).unwrap(), b"2222");
        // A name that is taken is left as it is.
        fs::remove_file(target.join("first")).unwrap();
        assert!(write_folder(&target, &files, write_synced).is_err());
        assert_eq!((names(folder.path()), names(&target)), (vec!["step-1".to_owned()], vec!["second".to_owned()]));
        remove_folder(&target).unwrap();
        assert!(names(folder.path()).is_empty());
    }

    #[test]
    fn a_file_that_cannot_be_replaced_stays_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("taken");
        fs::create_dir_all(path.join("inside")).unwrap(); // no file can be renamed to it
        assert!(write_atomically(&path, b"new").is_err());
        assert_eq!(names(folder.path()), ["taken"]);
    }

    #[test]
    fn only_the_leftovers_of_our_own_names_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join(".writing-step-1/inside")).unwrap();
        for name in [".writing-log", ".writing-essay", "step-1"] {
            fs::write(folder.path().join(name), b"").unwrap();
        }
        clean(folder.path(), |name| name == "log" || name.starts_with("step-")).unwrap();
        assert_eq!(names(folder.path()), [".writing-essay", "step-1"]);
    }

    #[test]
    fn one_run_at_a_time_has_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        let lock = Lock::take(folder.path()).unwrap();
        let error = Lock::take(folder.path()).unwrap_err();
        assert!(matches!(&error, Error::Locked { path } if path == folder.path()), "{error}");
        assert!(error.to_string().contains(&folder.path().display().to_string()));
        drop(lock);
        Lock::take(folder.path()).unwrap();
    }
}
