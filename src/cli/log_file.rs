//! The log file of a node, which can be opened again after it was renamed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context as _;
use tracing_subscriber::fmt::MakeWriter;

/// A file that lines are appended to. Clones share it.
#[derive(Debug, Clone)]
pub struct LogFile(Arc<(PathBuf, Mutex<File>)>);

impl LogFile {
    /// Opens the file for appending, and creates it and its folder where they are missing.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        Ok(Self(Arc::new((path.into(), Mutex::new(append(path)?)))))
    }

    /// Opens the file at its path again: after a rename the lines go into a new file. On an error they go where they went before.
    pub fn reopen(&self) -> anyhow::Result<()> {
        let (path, file) = &*self.0;
        let next = append(path)?;
        *file.lock().unwrap_or_else(PoisonError::into_inner) = next;
        Ok(())
    }
}

impl Write for LogFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Whole: two lines never share the place of one, also while the file is opened again.
        self.0.1.lock().unwrap_or_else(PoisonError::into_inner).write_all(bytes).map(|()| bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.1.lock().unwrap_or_else(PoisonError::into_inner).flush()
    }
}

impl MakeWriter<'_> for LogFile {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

fn append(path: &Path) -> anyhow::Result<File> {
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    let file = OpenOptions::new().create(true).append(true).open(path);
    file.with_context(|| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_go_into_a_new_file_once_the_old_one_was_renamed() {
        let dir = tempfile::tempdir().unwrap();
        let (path, old) = (dir.path().join("logs/a.log"), dir.path().join("logs/a.log.1"));
        let mut log = LogFile::open(&path).unwrap();
        log.write_all(b"first\n").unwrap();
        fs::rename(&path, &old).unwrap();
        log.write_all(b"second\n").unwrap();
        log.reopen().unwrap();
        log.write_all(b"third\n").unwrap();
        assert_eq!(fs::read_to_string(&old).unwrap(), "first\nsecond\n");
        assert_eq!(fs::read_to_string(&path).unwrap(), "third\n");
        // Where it can't be opened, no line is lost.
        fs::rename(&path, dir.path().join("logs/a.log.2")).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(log.reopen().is_err());
        log.write_all(b"fourth\n").unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("logs/a.log.2")).unwrap(), "third\nfourth\n");
    }
}
